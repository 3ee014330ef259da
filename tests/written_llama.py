"""One small LLaMA written as other exporters write theirs: attention, norms, caches, opsets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MICROSOFT = "com.microsoft"
HIDDEN, INNER, VOCAB, LAYERS, HEADS, WIDTH, POSITIONS = 32, 48, 40, 3, 4, 16, 64


@dataclass(frozen=True)
class Style:
    """How a decoder is written. ``kv_heads`` follows from what the operators can do."""

    attention: str = "standard"
    norm: str = "rms"
    cache: str = "split"
    opset: int = 24
    positions: str = "given"
    source: str = "inputs_embeds"
    mask: str = "added"
    dtype: str = "float"

    @property
    def kv_heads(self) -> int:
        """MultiHeadAttention has as many as query heads."""
        return HEADS if self.attention == "mha" else 2

    @property
    def lengths(self) -> bool:
        """Whether lengths are inputs, not derived from attention_mask."""
        return self.mask == "lengths"


def tiny_llama(kv_heads: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """Random weights, sharp attention."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=WIDTH,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape)
            weight.copy_(1 + 0.1 * noise if "norm" in name else noise / weight.shape[-1] ** 0.5)
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(2)
    return model


def write(model: LlamaForCausalLM, style: Style, **changes: str) -> ir.Model:
    """``model`` in ONNX, as ``style`` says; ``changes`` replace text before it is read."""
    text = _Writer(style, model.config.rms_norm_eps).text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    made = ir.from_onnx_text(text)
    weights = dict(_weights(model, style))
    for value in list(made.graph.inputs):
        if value.name in weights:
            made.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            made.graph.initializers[value.name] = value
    return made


def parts(layer: Any) -> dict[str, torch.nn.Linear]:
    """The products of a layer, by the names that the graphs give them."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    owners = (*[layer.self_attn] * 4, *[layer.mlp] * 3)
    return {name: getattr(owner, f"{name}_proj") for name, owner in zip(names, owners, strict=True)}


def _weights(model: LlamaForCausalLM, style: Style) -> Iterator[tuple[str, Any]]:
    kind = np.float16 if style.dtype == "float16" else np.float32

    def plain(weight: torch.Tensor) -> Any:
        return np.ascontiguousarray(weight.detach().numpy()).astype(kind)

    for index, layer in enumerate(model.model.layers):
        yield f"norm_{index}", plain(layer.input_layernorm.weight)
        yield f"post_{index}", plain(layer.post_attention_layernorm.weight)
        linears = parts(layer)
        for name, part in linears.items():
            yield f"w{name}_{index}", plain(part.weight.T)
        packed = torch.cat([linears[name].weight for name in "qkv"]).T
        yield f"wqkv_{index}", plain(packed)
    yield "norm", plain(model.model.norm.weight)
    yield "head", plain(model.lm_head.weight.T)
    yield "table", plain(model.model.embed_tokens.weight)
    frequencies = model.model.rotary_emb.inv_freq
    angles = torch.arange(POSITIONS)[:, None] * frequencies[None]
    yield "cos_cache", plain(angles.cos())
    yield "sin_cache", plain(angles.sin())
    yield "frequencies", plain(frequencies)


class _Writer:
    """Lines of ONNX text."""

    def __init__(self, style: Style, epsilon: float) -> None:
        self.style, self.epsilon = style, epsilon
        self.kind = 10 if style.dtype == "float16" else 1  # ONNX's number for the type
        self.lines: list[str] = []
        self.inputs: list[str] = []
        self.outputs = [f"{style.dtype}[b,s,{VOCAB}] logits"]

    def text(self) -> str:
        """Everything."""
        style = self.style
        self._sources()
        stream, pending = "embeds", ""
        for i in range(LAYERS):
            normed, stream = self._norm(stream, pending, f"norm_{i}", f"a_{i}")
            mixed = self._attention(i, normed)
            self._(f"o_{i} = MatMul ({mixed}, wo_{i})")
            normed, stream = self._norm(stream, f"o_{i}", f"post_{i}", f"m_{i}")
            self._(f"g_{i} = MatMul ({normed}, wgate_{i})")
            self._(f"sg_{i} = Sigmoid (g_{i})")
            self._(f"act_{i} = Mul (g_{i}, sg_{i})")
            self._(f"u_{i} = MatMul ({normed}, wup_{i})")
            self._(f"gu_{i} = Mul (act_{i}, u_{i})")
            self._(f"d_{i} = MatMul (gu_{i}, wdown_{i})")
            pending = f"d_{i}"
        normed, _ = self._norm(stream, pending, "norm", "last")
        self._(f"logits = MatMul ({normed}, head)")
        header = f'<ir_version: 10, opset_import: ["": {style.opset}, "{MICROSOFT}": 1]>'
        body = "\n".join(self.lines)
        self.inputs += self._weight_inputs(body)
        return f"{header} g ({', '.join(self.inputs)}) => ({', '.join(self.outputs)}) {{ {body} }}"

    def _(self, line: str) -> None:
        self.lines.append("   " + line)

    def _ints(self, name: str, *values: int) -> str:
        self._(f"{name} = Constant <value_ints: ints = [{', '.join(map(str, values))}]> ()")
        return name

    def _weight_inputs(self, body: str) -> list[str]:
        t, kv = self.style.dtype, self.style.kv_heads * WIDTH
        q = HEADS * WIDTH
        shapes = {
            "wq": f"{HIDDEN},{q}", "wk": f"{HIDDEN},{kv}", "wv": f"{HIDDEN},{kv}",
            "wqkv": f"{HIDDEN},{q + 2 * kv}", "wo": f"{q},{HIDDEN}", "norm": f"{HIDDEN}",
            "post": f"{HIDDEN}", "wgate": f"{HIDDEN},{INNER}", "wup": f"{HIDDEN},{INNER}",
            "wdown": f"{INNER},{HIDDEN}",
        }  # fmt: skip
        found = [(f"{n}_{i}", s) for n, s in shapes.items() for i in range(LAYERS)]
        half = f"{POSITIONS},{WIDTH // 2}"
        found += [("norm", f"{HIDDEN}"), ("head", f"{HIDDEN},{VOCAB}"), ("cos_cache", half)]
        found += [("sin_cache", half), ("table", f"{VOCAB},{HIDDEN}")]
        found += [("frequencies", f"{WIDTH // 2}")]
        words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
        return [f"{t}[{shape}] {name}" for name, shape in found if name in words]

    def _sources(self) -> None:
        """Inputs, positions and masks."""
        style, t = self.style, self.style.dtype
        if style.source == "input_ids":
            self.inputs.append("int64[b,s] input_ids")
            self._("embeds = Gather (table, input_ids)")
        else:
            self.inputs.append(f"{t}[b,s,{HIDDEN}] {style.source}")
            self._(f"embeds = Identity ({style.source})")
        if style.lengths:
            self.inputs += ["int32[b] seqlens_k", "int32[1] total_sequence_length"]
        else:
            self.inputs.append("int64[b,t] attention_mask")
        if style.positions in ("given", "operator"):
            self.inputs.append("int64[b,s] position_ids")
        self._constants()
        for index in range(LAYERS):
            self._cache(index)
        if not style.attention.startswith("gqa"):
            self._mask()
        elif not style.lengths:
            self._lengths()
        if style.attention not in ("gqa_rotary", "gqa_packed") and style.positions != "operator":
            self._tables()

    def _constants(self) -> None:
        for name, value in (("i0", 0), ("i1", 1), ("i2", 2), ("i3", 3), ("im1", -1)):
            self._ints(name, value)
        for name, value in (("n0", 0), ("n1", 1)):
            self._(f"{name} = Constant <value_int: int = {value}> ()")
        self._("size = Shape (embeds)")
        self._("s_ = Gather (size, i1)")
        self._("b_ = Gather (size, i0)")

    def _lengths(self) -> None:
        """What GroupQueryAttention asks for."""
        self._("sum = ReduceSum <keepdims: int = 0> (attention_mask, i1)")
        self._("less = Sub (sum, n1)")
        self._("seqlens_k = Cast <to: int = 6> (less)")
        self._("mask_size = Shape (attention_mask)")
        self._("total_ = Gather (mask_size, i1)")
        self._("total_sequence_length = Cast <to: int = 6> (total_)")

    def _cache(self, i: int) -> None:
        t, heads, cache = self.style.dtype, self.style.kv_heads, self.style.cache
        if cache == "merged":
            self.inputs.append(f"{t}[2,b,{heads},p,{WIDTH}] past_{i}")
            self.outputs.append(f"{t}[2,b,{heads},t,{WIDTH}] present_{i}")
            self._(f"pk_{i} = Gather <axis: int = 0> (past_{i}, n0)")
            self._(f"pv_{i} = Gather <axis: int = 0> (past_{i}, n1)")
            return
        for what in "kv":
            for values, name, tokens in ((self.inputs, "p", "p"), (self.outputs, "all", "t")):
                own = f"b,{tokens},{heads}" if cache == "turned" else f"b,{heads},{tokens}"
                values.append(f"{t}[{own},{WIDTH}] {name}{what}_{i}")

    def _mask(self) -> None:
        """Causal and blind to padding, as legacy exporters compute it."""
        self._("past_size = Shape (pk_0)")
        self._ints("p_at", 1 if self.style.cache == "turned" else 2)
        self._("p_ = Gather (past_size, p_at)")
        self._("t_ = Add (p_, s_)")
        self._("p0 = Squeeze (p_)")
        self._("t0 = Squeeze (t_)")
        self._("keys = Range (n0, t0, n1)")
        self._("rows = Range (p0, t0, n1)")
        self._("rows_column = Unsqueeze (rows, i1)")
        self._("causal = LessOrEqual (keys, rows_column)")
        self._("real = Cast <to: int = 9> (attention_mask)")
        self._ints("i12", 1, 2)
        self._("real_keys = Unsqueeze (real, i12)")
        self._("visible = And (causal, real_keys)")
        low = "-65504.0" if self.kind == 10 else "-1e9"
        for name, value in (("low", low), ("zero", "0.0")):
            self._(f"{name}_ = Constant <value_float: float = {value}> ()")
            self._(f"{name} = Cast <to: int = {self.kind}> ({name}_)")
        self._("added = Where (visible, zero, low)")

    def _tables(self) -> None:
        """cos and sin [B,1,S,d/2]."""
        if self.style.positions == "implied":
            self._("first = Range (p0, t0, n1)")
            self._("where = Unsqueeze (first, i0)")
        elif self.style.positions == "counted":
            self._("counted = CumSum (attention_mask, n1)")
            self._("before = Sub (counted, n1)")
            self._("where = Slice (before, p_, t_, i1)")
        else:
            self._("where = Identity (position_ids)")
        self._(f"where_f = Cast <to: int = {self.kind}> (where)")
        self._("where_c = Unsqueeze (where_f, i2)")
        self._("angles = Mul (where_c, frequencies)")
        for name in ("Cos", "Sin"):
            low = name.lower()
            self._(f"{low}_row = {name} (angles)")
            self._(f"{low}_half = Unsqueeze ({low}_row, i1)")
            self._(f"{low}s = Concat <axis: int = -1> ({low}_half, {low}_half)")

    def _norm(self, stream: str, pending: str, scale: str, name: str) -> tuple[str, str]:
        """The normed value, and the stream behind what was pending."""
        kind, e = self.style.norm, self.epsilon
        normed, total = f"{name}_normed", f"{name}_sum"
        if kind == "skip" and pending:
            skip = f"{MICROSOFT}.SkipSimplifiedLayerNormalization <epsilon: float = {e}>"
            ports = f"({stream}, {pending}, {scale})"
            self._(f"{normed}, {name}_m, {name}_v, {total} = {skip} {ports}")
            return normed, total
        if pending:
            self._(f"{total} = Add ({stream}, {pending})")
            stream = total
        options = f"<epsilon: float = {e}, axis: int = -1>"
        if kind == "rms":
            self._(f"{normed} = RMSNormalization {options} ({stream}, {scale})")
        elif kind in ("simplified", "skip"):
            self._(f"{normed} = SimplifiedLayerNormalization {options} ({stream}, {scale})")
        else:
            self._plain_norm(stream, scale, name)
        return normed, stream

    def _plain_norm(self, stream: str, scale: str, name: str) -> None:
        old = "<axes: ints = [-1], keepdims: int = 1>", ""
        new = "<keepdims: int = 1>", ", im1"
        options, axes = old if self.style.opset < 18 else new
        self._(f"{name}_wide = Cast <to: int = 1> ({stream})")
        self._(f"{name}_square = Mul ({name}_wide, {name}_wide)")
        self._(f"{name}_mean = ReduceMean {options} ({name}_square{axes})")
        self._(f"{name}_eps = Constant <value_float: float = {self.epsilon}> ()")
        self._(f"{name}_more = Add ({name}_mean, {name}_eps)")
        self._(f"{name}_root = Sqrt ({name}_more)")
        self._(f"{name}_unit = Div ({name}_wide, {name}_root)")
        self._(f"{name}_typed = Cast <to: int = {self.kind}> ({name}_unit)")
        self._(f"{name}_normed = Mul ({name}_typed, {scale})")

    def _attention(self, i: int, normed: str) -> str:
        """The mixed rows [B,S,H·d]."""
        style = self.style
        if style.attention == "gqa_packed":
            self._(f"qkv_{i} = MatMul ({normed}, wqkv_{i})")
        else:
            for name in "qkv":
                self._(f"{name}_{i} = MatMul ({normed}, w{name}_{i})")
        kind = style.attention.partition("_")[0]
        written = {"gqa": self._grouped, "mha": self._multi_head, "standard": self._standard}
        mixed = written.get(kind, self._matmul)(i)
        if style.cache == "merged":
            for what in "kv":
                self._(f"one{what}_{i} = Unsqueeze (all{what}_{i}, i0)")
            self._(f"present_{i} = Concat <axis: int = 0> (onek_{i}, onev_{i})")
        return mixed

    def _call(self, i: int, operator: str, options: dict[str, int], ports: str) -> str:
        """An attention of one node."""
        said = ", ".join(f"{name}: int = {value}" for name, value in options.items())
        self._(f"mixed_{i}, allk_{i}, allv_{i} = {operator} <{said}> ({ports})")
        return f"mixed_{i}"

    def _grouped(self, i: int) -> str:
        style = self.style
        does = int(style.attention != "gqa")
        query = f"qkv_{i}, , " if style.attention == "gqa_packed" else f"q_{i}, k_{i}, v_{i}"
        if not does:
            query = f"{self._rotated_flat('q', i, HEADS)}, {self._rotated_flat('k', i, 2)}, v_{i}"
        tables = ", cos_cache, sin_cache" if does else ""
        options = {"num_heads": HEADS, "kv_num_heads": style.kv_heads, "do_rotary": does}
        ports = f"{query}, pk_{i}, pv_{i}, seqlens_k, total_sequence_length{tables}"
        return self._call(i, f"{MICROSOFT}.GroupQueryAttention", options, ports)

    def _multi_head(self, i: int) -> str:
        q, k = self._rotated_flat("q", i, HEADS), self._rotated_flat("k", i, HEADS)
        ports = f"{q}, {k}, v_{i}, , , added, pk_{i}, pv_{i}"
        return self._call(i, f"{MICROSOFT}.MultiHeadAttention", {"num_heads": HEADS}, ports)

    def _standard(self, i: int) -> str:
        q, k = self._rotated_flat("q", i, HEADS), self._rotated_flat("k", i, self.style.kv_heads)
        mask, causal = ("real_keys4", 1) if self.style.mask == "padding" else ("added", 0)
        if causal and i == 0:
            self._("bst = Concat <axis: int = 0> (b_, i1, s_, t_)")
            self._("real_keys4 = Expand (real_keys, bst)")
        options = {"q_num_heads": HEADS, "kv_num_heads": self.style.kv_heads, "is_causal": causal}
        return self._call(i, "Attention", options, f"{q}, {k}, v_{i}, {mask}, pk_{i}, pv_{i}")

    def _split(self, name: str, i: int, heads: int) -> str:
        """[B,S,H·d] → [B,H,S,d], by a shape that is computed."""
        ports = f"b_, s_, {self._ints(f'{name}h_{i}', heads)}, {self._ints(f'{name}d_{i}', WIDTH)}"
        self._(f"{name}shape_{i} = Concat <axis: int = 0> ({ports})")
        self._(f"{name}rows_{i} = Reshape ({name}_{i}, {name}shape_{i})")
        self._(f"{name}4_{i} = Transpose <perm: ints = [0, 2, 1, 3]> ({name}rows_{i})")
        return f"{name}4_{i}"

    def _rotate(self, value: str) -> str:
        self._ints(f"{value}_at", WIDTH // 2)
        self._ints(f"{value}_end", 2**63 - 1)
        self._(f"{value}_low = Slice ({value}, i0, {value}_at, i3)")
        self._(f"{value}_high = Slice ({value}, {value}_at, {value}_end, i3)")
        self._(f"{value}_neg = Neg ({value}_high)")
        self._(f"{value}_half = Concat <axis: int = 3> ({value}_neg, {value}_low)")
        self._(f"{value}_c = Mul ({value}, coss)")
        self._(f"{value}_s = Mul ({value}_half, sins)")
        self._(f"{value}_r = Add ({value}_c, {value}_s)")
        return f"{value}_r"

    def _rotated_flat(self, name: str, i: int, heads: int) -> str:
        """Turned in [B,H,S,d], and laid flat again; or by an operator that is told positions."""
        if self.style.positions == "operator":
            ports = f"({name}_{i}, position_ids, cos_cache, sin_cache)"
            self._(f"{name}flat_{i} = {MICROSOFT}.RotaryEmbedding {ports}")
            return f"{name}flat_{i}"
        turned = self._rotate(self._split(name, i, heads))
        self._(f"{name}back_{i} = Transpose <perm: ints = [0, 2, 1, 3]> ({turned})")
        width = self._ints(f"{name}flat_at_{i}", heads * WIDTH)
        self._(f"{name}flat_to_{i} = Concat <axis: int = 0> (b_, s_, {width})")
        self._(f"{name}flat_{i} = Reshape ({name}back_{i}, {name}flat_to_{i})")
        return f"{name}flat_{i}"

    def _matmul(self, i: int) -> str:
        """MatMul, Softmax, MatMul, with heads repeated by Expand."""
        kv = self.style.kv_heads
        q = self._rotate(self._split("q", i, HEADS))
        new = {"k": self._rotate(self._split("k", i, kv)), "v": self._split("v", i, kv)}
        for what, value in new.items():
            self._cached(what, i, value)
            self._repeated(what, i)
        self._(f"kt_{i} = Transpose <perm: ints = [0, 1, 3, 2]> (xk_{i})")
        self._(f"probability_{i} = Softmax <axis: int = -1> ({self._logits(i, q)})")
        self._(f"heads_{i} = MatMul (probability_{i}, xv_{i})")
        self._(f"turned_{i} = Transpose <perm: ints = [0, 2, 1, 3]> (heads_{i})")
        width = self._ints(f"width_{i}", HEADS * WIDTH)
        self._(f"flat_{i} = Concat <axis: int = 0> (b_, s_, {width})")
        self._(f"mixed_{i} = Reshape (turned_{i}, flat_{i})")
        return f"mixed_{i}"

    def _cached(self, what: str, i: int, new: str) -> None:
        """Past and new, as [B,kv,T,d]."""
        if self.style.cache == "turned":
            self._(f"new{what}_{i} = Transpose <perm: ints = [0, 2, 1, 3]> ({new})")
            self._(f"all{what}_{i} = Concat <axis: int = 1> (p{what}_{i}, new{what}_{i})")
            self._(f"h{what}_{i} = Transpose <perm: ints = [0, 2, 1, 3]> (all{what}_{i})")
        else:
            self._(f"all{what}_{i} = Concat <axis: int = -2> (p{what}_{i}, {new})")
            self._(f"h{what}_{i} = Identity (all{what}_{i})")

    def _repeated(self, what: str, i: int) -> None:
        kv = self.style.kv_heads
        for name, value in (("kv", kv), ("g", HEADS // kv), ("w", WIDTH), ("H", HEADS)):
            self._ints(f"{what}{name}_{i}", value)
        self._(f"r{what}_{i} = Unsqueeze (h{what}_{i}, i2)")
        wide = f"b_, {what}kv_{i}, {what}g_{i}, t_, {what}w_{i}"
        self._(f"to{what}_{i} = Concat <axis: int = 0> ({wide})")
        self._(f"e{what}_{i} = Expand (r{what}_{i}, to{what}_{i})")
        self._(f"sh{what}_{i} = Concat <axis: int = 0> (b_, {what}H_{i}, t_, {what}w_{i})")
        self._(f"x{what}_{i} = Reshape (e{what}_{i}, sh{what}_{i})")

    def _logits(self, i: int, q: str) -> str:
        root = WIDTH**0.5 if self.style.attention == "matmul" else WIDTH**-0.25
        self._(f"root32_{i} = Constant <value_float: float = {root}> ()")
        self._(f"root_{i} = Cast <to: int = {self.kind}> (root32_{i})")
        if self.style.attention == "matmul":
            self._(f"raw_{i} = MatMul ({q}, kt_{i})")
            self._(f"scaled_{i} = Div (raw_{i}, root_{i})")
        else:
            self._(f"qs_{i} = Mul ({q}, root_{i})")
            self._(f"ks_{i} = Mul (kt_{i}, root_{i})")
            self._(f"scaled_{i} = MatMul (qs_{i}, ks_{i})")
        if self.style.mask == "where":
            self._(f"logits_{i} = Where (visible, scaled_{i}, low)")
        else:
            self._(f"logits_{i} = Add (scaled_{i}, added)")
        return f"logits_{i}"
