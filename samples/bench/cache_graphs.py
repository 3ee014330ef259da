"""A small decoder with cuts, its key-value cache written in every form that TensorRT offers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass

from vtr_export import ops
from vtr_export.passes.insert_cuts import InsertCuts
from vtr_export.passes.scale_queries import ScaleQueries
from vtr_export.schedule import Cut, Keep, Resolved

Weights = dict[str, tuple[int, ...]]

TRT = "trt"  # any domain does: TensorRT knows its own operators by name
DTYPES = {
    "float": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Form:
    """How a stage's cache grows, and how attention is told what to see of it.

    ``update``: the operator that puts new rows behind old ones; all but Concat write into a cache
    of fixed length. ``window``: attention reads a slice, as long as what is filled, not all;
    ``prompts``: unless the call is a single token, for which all is read.
    """

    name: str
    update: str = "Concat"
    window: Literal["", "always", "prompts"] = ""
    mask: bool = True
    kv_lengths: bool = False
    scaled: bool = True  # queries are, before attention
    decomposable: bool = False  # attention may become several kernels

    @property
    def is_static(self) -> bool:
        """Whether the cache is as long as it may ever get."""
        return self.update != "Concat"

    @property
    def attention(self) -> str:
        """The operator."""
        return "TRT_Attention" if self.kv_lengths else "Attention"

    @property
    def left_padding(self) -> bool:
        """Whether columns in front can be hidden: lengths count from the first column on."""
        return self.mask


FORMS = (
    Form("concat", scaled=False),
    Form("concat, queries scaled"),
    Form("concat, lengths", mask=False, kv_lengths=True),
    Form("concat, mask and lengths", kv_lengths=True),
    Form("static", update="TRT_KVCacheUpdate"),
    Form("static, window", update="TRT_KVCacheUpdate", window="always"),
    Form("static, window of prompts", update="TRT_KVCacheUpdate", window="prompts"),
    Form("static, lengths", update="TRT_KVCacheUpdate", mask=False, kv_lengths=True),
    Form("static, ONNX", update="TensorScatter"),
)
# what is not fused looks like
DECOMPOSED = Form("concat, decomposable", scaled=False, decomposable=True)


@dataclass(frozen=True)
class Toy:
    """Widths of the decoder, tokens of an image, and how many of them each cut keeps."""

    layers: int = 4
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    width: int = 32
    tokens: int = 32
    cuts: Mapping[int, int] | None = None

    def resolved(self) -> Resolved:
        """The schedule."""
        cuts = {1: self.tokens // 2, self.layers - 1: self.tokens // 8}
        listed = (self.cuts or cuts).items()
        keeps = tuple(Cut(layer, Keep(keep, self.tokens)) for layer, keep in listed)
        return Resolved(self.layers, self.tokens, keeps)


def decoder(toy: Toy, dtype: str = "float16", seed: int = 0) -> ir.Model:
    """With cuts, in the canonical form; random weights of unit gain."""
    text, weights = _text(toy, dtype)
    model = ir.from_onnx_text(text)
    for node in list(model.graph):
        if node.domain == ops.DOMAIN:
            ops.declare(model, node.op_type)
    ShapeInferencePass()(model)
    generator = np.random.default_rng(seed)
    for value in [value for value in model.graph.inputs if value.name in weights]:
        array = _drawn(generator, str(value.name), weights[str(value.name)])
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array.astype(value.dtype.numpy()), name=value.name)
        model.graph.register_initializer(value)
    return _finished(InsertCuts(toy.resolved())(model).model)


def rewritten(model: ir.Model, form: Form, capacity: int = 0) -> ir.Model:
    """The canonical ``model`` in ``form``; static caches hold ``capacity`` columns in each stage.

    Ports keep their names. A static cache keeps its shape from input to output; how much of it
    is filled follows from ``attention_mask`` and ``past_mask.J``, as long as ever.
    """
    model = model.clone()
    if form.scaled:
        ScaleQueries()(model)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        _Rewrite(model, node, form, capacity).apply()
    model.graph.opset_imports[TRT] = 1
    return _finished(model)


def _finished(model: ir.Model) -> ir.Model:
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    return model


class _Rewrite:
    """One attention of a model."""

    def __init__(self, model: ir.Model, node: ir.Node, form: Form, capacity: int) -> None:
        self.graph, self.node, self.form, self.capacity = model.graph, node, form, capacity
        self.query, self.keys, self.values, self.mask = node.inputs[:4]
        self.batch, self.new = self._dim(self.query, 0), self._dim(self.query, 2)
        self.total = self._dim(self.mask, 3)
        self.shown = self._shown()

    def apply(self) -> None:
        """Change the cache, then what attention reads of it."""
        keys, values, mask = self.keys, self.values, self.mask
        if self.form.is_static:
            keys, values = self._updated(keys), self._updated(values)
            mask = self._widened(mask) if self.form.mask else mask
        if self.form.kv_lengths:
            self._attend_by_lengths(keys, values, mask if self.form.mask else None)
            return
        for index, value in ((1, keys), (2, values), (3, mask)):
            self.node.replace_input_with(index, value)
        if self.form.decomposable:
            self.node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)

    def _updated(self, present: ir.Value) -> ir.Value:
        """What attention reads; the graph's output is the whole cache, its input as long."""
        past, new = present.producer().inputs
        past.shape = ir.Shape([*past.shape[:2], self.capacity, past.shape[3]])
        at = self._op("Expand", [self._op("Sub", [self.total, self.new]), self.batch])
        if self.form.update == "TensorScatter":
            cache = self._op("TensorScatter", [past, new, at], axis=-2, mode="linear")
        else:
            at = self._op("Cast", [at], to=int(ir.DataType.INT32))
            cache = self._op(self.form.update, [past, new, at], TRT, mode="linear")
        cache.type, cache.shape = past.type, past.shape
        filled, window = (self._front(cache, end) for end in (self.total, self.shown))
        name, index = present.name, list(self.graph.outputs).index(present)
        for use in list(present.uses()):  # what ranks tokens asks for no more than there is
            if use.node is not self.node:
                use.node.replace_input_with(use.idx, filled)
        present.name, cache.name = f"{name}.concatenated", name
        self.graph.outputs[index] = cache
        return window if self.form.window else cache

    def _shown(self) -> ir.Value:
        """[1]: columns that attention reads, if not all."""
        if self.form.window != "prompts":
            return self.total
        rest = self._op("Sub", [self._ints(self.capacity), self.total])
        single = self._op("Equal", [self.new, self._ints(1)])
        single = self._op("Cast", [single], to=int(ir.DataType.INT64))
        return self._op("Add", [self.total, self._op("Mul", [rest, single])])

    def _front(self, cache: ir.Value, end: ir.Value) -> ir.Value:
        front = self._op("Slice", [cache, self._ints(0), end, self._ints(2), self._ints(1)])
        front.type = cache.type
        return front

    def _widened(self, mask: ir.Value) -> ir.Value:
        """Nobody sees what is not filled."""
        if self.form.window == "always":
            return mask
        shown = self.shown if self.form.window else self._ints(self.capacity)
        rest = self._op("Sub", [shown, self.total])
        shape = self._op("Concat", [self.batch, self._ints(1), self.new, rest], axis=0)
        unseen = self._op("ConstantOfShape", [shape], value=ir.tensor(np.array([False])))
        return self._op("Concat", [mask, unseen], axis=3)

    def _attend_by_lengths(self, keys: ir.Value, values: ir.Value, mask: ir.Value | None) -> None:
        wide = self._op("Expand", [self.total, self.batch])
        lengths = self._op("Cast", [wide], to=int(ir.DataType.INT32))
        inputs = [self.query, keys, values, mask, None, lengths]
        kind = "none" if self.form.mask else "lower_right"
        heads = self._op("TRT_Attention", inputs, TRT, causal_kind=kind)
        heads.type, heads.shape = self.node.outputs[0].type, self.node.outputs[0].shape
        self.node.outputs[0].replace_all_uses_with(heads)

    def _dim(self, value: ir.Value, axis: int) -> ir.Value:
        return self._op("Shape", [value], start=axis, end=axis + 1)

    def _ints(self, *values: int) -> ir.Value:
        return self._op("Constant", [], value_ints=list(values))

    def _op(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attrs: Any
    ) -> ir.Value:
        node = ir.Node(domain, op_type, inputs, ir.convenience.convert_attributes(attrs))
        node.name = f"cache.{len(self.graph)}.{op_type}"
        node.outputs[0].name = f"{node.name}.out"
        self.graph.append(node)
        return node.outputs[0]


def _drawn(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "frequencies":
        return 1e4 ** -(np.arange(*shape) / shape[0])
    if len(shape) == 1:
        return np.ones(shape)
    return generator.normal(size=shape) / math.sqrt(shape[0])


def _text(toy: Toy, dtype: str) -> tuple[str, Weights]:
    """The uncut decoder, weights among its inputs; and the shapes of these.

    No value is called as one inside our operators is: TensorRT's parser takes a constant of the
    graph for a function's of the same name.
    """
    weights: Weights = {"frequencies": (toy.width // 2,), "head": (toy.hidden, 8)}
    cache = f"{dtype}[batch,{toy.kv_heads},{{}},{toy.width}]"
    inputs = ["int64[batch,total] attention_mask", "int64[batch,sequence] position_ids"]
    inputs.insert(0, f"{dtype}[batch,sequence,{toy.hidden}] inputs_embeds")
    outputs, body, hidden = [f"{dtype}[batch,1,8] logits"], _head(toy, dtype), "inputs_embeds"
    for i in range(toy.layers):
        for part in ("key", "value"):
            inputs.append(f'{cache.format("past")} "past_key_values.{i}.{part}"')
            outputs.append(f'{cache.format("total")} "present.{i}.{part}"')
        q, kv = toy.heads * toy.width, toy.kv_heads * toy.width
        weights |= {f"norm_{i}": (toy.hidden,), f"wq_{i}": (toy.hidden, q),
                    f"wk_{i}": (toy.hidden, kv), f"wv_{i}": (toy.hidden, kv),
                    f"wo_{i}": (q, toy.hidden), f"wm_{i}": (toy.hidden, toy.hidden)}  # fmt: skip
        body += _layer(i, hidden)
        hidden = f"hidden_{i + 1}"
    body += f"""
        row_last = Slice ({hidden}, at_last, at_far, at_one)
        logits = MatMul (row_last, head)"""
    types = {"frequencies": "float"}
    inputs += [f"{types.get(name, dtype)}{list(shape)} {name}" for name, shape in weights.items()]
    signature = f"({', '.join(inputs)}) => ({', '.join(outputs)})"
    header = '<ir_version: 11, opset_import: ["": 24, "vtr": 1]>'
    return f"{header} decoder {signature} {{{body}\n}}", weights


def _head(toy: Toy, dtype: str) -> str:
    to = int(ir.DataType.from_numpy(DTYPES[dtype]))
    return f"""
        mask_all = vtr.VtrCausalMask (attention_mask, inputs_embeds)
        at_one = Constant <value_ints: ints = [1]> ()
        at_two = Constant <value_ints: ints = [2]> ()
        at_last = Constant <value_ints: ints = [-1]> ()
        at_far = Constant <value_ints: ints = [9223372036854775807]> ()
        shape_q = Constant <value_ints: ints = [0, 0, {toy.heads}, {toy.width}]> ()
        shape_kv = Constant <value_ints: ints = [0, 0, {toy.kv_heads}, {toy.width}]> ()
        shape_flat = Constant <value_ints: ints = [0, 0, {toy.heads * toy.width}]> ()
        position = Unsqueeze (position_ids, at_two)
        position_float = Cast <to: int = 1> (position)
        angles = Mul (position_float, frequencies)
        cos_wide = Cos (angles)
        sin_wide = Sin (angles)
        cos_all = Cast <to: int = {to}> (cos_wide)
        sin_all = Cast <to: int = {to}> (sin_wide)"""


def _layer(i: int, hidden: str) -> str:
    swap = "Transpose <perm: ints = [0, 2, 1, 3]>"
    return f"""
        normed_{i} = RMSNormalization ({hidden}, norm_{i})
        q_flat_{i} = MatMul (normed_{i}, wq_{i})
        k_flat_{i} = MatMul (normed_{i}, wk_{i})
        v_flat_{i} = MatMul (normed_{i}, wv_{i})
        q_rows_{i} = Reshape (q_flat_{i}, shape_q)
        k_rows_{i} = Reshape (k_flat_{i}, shape_kv)
        v_rows_{i} = Reshape (v_flat_{i}, shape_kv)
        q_{i} = {swap} (q_rows_{i})
        k_{i} = {swap} (k_rows_{i})
        value_{i} = {swap} (v_rows_{i})
        query_{i} = RotaryEmbedding (q_{i}, cos_all, sin_all)
        key_{i} = RotaryEmbedding (k_{i}, cos_all, sin_all)
        "present.{i}.key" = Concat <axis: int = 2> ("past_key_values.{i}.key", key_{i})
        "present.{i}.value" = Concat <axis: int = 2> ("past_key_values.{i}.value", value_{i})
        heads_{i} = Attention (query_{i}, "present.{i}.key", "present.{i}.value", mask_all)
        heads_rows_{i} = {swap} (heads_{i})
        mixed_{i} = Reshape (heads_rows_{i}, shape_flat)
        out_{i} = MatMul (mixed_{i}, wo_{i})
        attended_{i} = Add ({hidden}, out_{i})
        inner_{i} = MatMul (attended_{i}, wm_{i})
        active_{i} = Tanh (inner_{i})
        hidden_{i + 1} = Add (attended_{i}, active_{i})"""
