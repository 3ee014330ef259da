"""Writes the graph of a decoder, node by node."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from vtr_export import ops

if TYPE_CHECKING:
    from random_decoders import Decoder

Tables = tuple[ir.Value, ir.Value] | None
FAR = 2**63 - 1
EPSILON = 1e-5
TABLE_ROWS = 64
SOFTCAP = 1.5


class Weights(Protocol):
    """Where initializers come from."""

    def __call__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
        """A tensor: the named weights side by side along their last axis."""
        ...


class Pen:
    """Writes nodes and initializers."""

    def __init__(self, decoder: Decoder, weights: Weights) -> None:
        self.decoder, self.weights = decoder, weights
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.count = 0

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """One node; its output, or a list of them."""
        given = {name: value for name, value in attributes.items() if value is not None}
        node = ir.node(op_type, list(inputs), given, domain=domain, num_outputs=outputs)
        for value in node.outputs:
            value.name = f"made_{self.count}"
            self.count += 1
        node.name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def weight(self, *named: tuple[str, tuple[int, ...]]) -> ir.Value:
        """The named weights, side by side."""
        names = [name for name, _ in named]
        key = "+".join(names)
        if key not in self.initializers:
            tensor = self.weights(names, [shape for _, shape in named])
            self.initializers[key] = self._initializer(key, tensor)
        return self.initializers[key]

    def ints(self, *values: int, scalar: bool = False) -> ir.Value:
        """An int64 vector or scalar."""
        array = np.array(values[0] if scalar else values, np.int64)
        if self.decoder.constants == "nodes":
            return self.op("Constant", value=ir.tensor(array, name=f"made_{self.count}"))
        key = f"ints_{'scalar_' if scalar else ''}{'_'.join(map(str, values))}"
        if key not in self.initializers:
            self.initializers[key] = self._initializer(key, ir.tensor(array, name=key))
        return self.initializers[key]

    def number(self, value: float) -> ir.Value:
        """A scalar of the graph's type."""
        key = f"number_{value}"
        if key not in self.initializers:
            tensor = ir.tensor(np.array(value, self.decoder.dtype), name=key)
            self.initializers[key] = self._initializer(key, tensor)
        return self.initializers[key]

    def slice(
        self, value: ir.Value, start: int, end: int, axis: int = -1, step: int = 1
    ) -> ir.Value:
        bounds = (self.ints(start), self.ints(end), self.ints(axis), self.ints(step))
        return self.op("Slice", value, *bounds)

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
        )
        return value


class Builder:
    """One graph."""

    def __init__(self, decoder: Decoder, weights: Weights) -> None:
        self.it, self.pen = decoder, Pen(decoder, weights)
        self.float = ir.DataType.FLOAT16 if decoder.fp16 else ir.DataType.FLOAT
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[ir.Value] = []

    def model(self) -> ir.Model:
        """The checked graph, shapes inferred."""
        hidden, mask = self._inputs()
        given = self._tables() if self.it.rotated and self.it.tables != "each_layer" else None
        for index in range(self.it.layers):
            tables = given or (self._tables() if self.it.rotated else None)
            hidden = self._layer(index, hidden, mask, tables)
            if index < self.it.planes:
                hidden = self.pen.op("Add", hidden, self._plane(index))
        self._output("logits", self._logits(hidden), ("batch", "rows", self.it.vocabulary))
        self.outputs.insert(0, self.outputs.pop())
        graph = ir.Graph(
            list(self.inputs.values()),
            self.outputs,
            nodes=self.pen.nodes,
            initializers=list(self.pen.initializers.values()),
            opset_imports={"": self.it.opset},
            name="decoder",
        )
        model = ir.Model(graph, ir_version=11 if self.it.opset == 24 else 10)
        for node in list(graph):
            if node.domain == ops.DOMAIN:
                ops.declare(model, node.op_type)
        return model

    # --- around the layers ---

    def _inputs(self) -> tuple[ir.Value, ir.Value]:
        it = self.it
        hidden = self._input("inputs_embeds", ("batch", "sequence", it.width))
        positions = ("batch", "sequence") if not it.is_mrope else (3, "batch", "sequence")
        self._input("position_ids", positions, ir.DataType.INT64)
        if it.stand_in:
            mask = self._input("mask", ("batch", 1, "sequence", "total"), ir.DataType.BOOL)
        else:
            padding = self._input("attention_mask", ("batch", "total"), ir.DataType.INT64)
            kind, more = "VtrCausalMask", [hidden]
            if it.grouped:
                kind = "VtrGroupMask"
                more = [self._input("groups", ("batch", "sequence"), ir.DataType.INT64)] * 2
            mask = self.pen.op(kind, padding, *more, domain=ops.DOMAIN)
        if it.absolute:
            table = self.pen.weight(("absolute", (TABLE_ROWS, it.width)))
            hidden = self.pen.op(
                "Add", hidden, self.pen.op("Gather", table, self.inputs["position_ids"])
            )
        return hidden, mask

    def _input(
        self, name: str, shape: Sequence[int | str], dtype: ir.DataType | None = None
    ) -> ir.Value:
        if name not in self.inputs:
            self.inputs[name] = ir.val(name, dtype or self.float, shape)
        return self.inputs[name]

    def _output(self, name: str, value: ir.Value, shape: Sequence[int | str]) -> None:
        value.name = name
        value.type, value.shape = ir.TensorType(self.float), ir.Shape(shape)
        self.outputs.append(value)

    def _plane(self, index: int) -> ir.Value:
        shape = ("batch", "sequence", self.it.width)
        if not self.it.stacked_planes:
            return self._input(f"deepstack.{index}", shape)
        stack = self._input("deepstack", (self.it.planes, *shape))
        return self.pen.op("Gather", stack, self.pen.ints(index, scalar=True), axis=0)

    def _logits(self, hidden: ir.Value) -> ir.Value:
        pen, it = self.pen, self.it
        hidden = self._norm(hidden, "last")
        if it.logits == "last":
            hidden = pen.slice(hidden, -1, FAR, axis=1)
        elif it.logits == "gathered":
            hidden = pen.op("Gather", hidden, pen.ints(-1), axis=1)
        return pen.op("MatMul", hidden, pen.weight(("head", (it.width, it.vocabulary))))

    # --- positions ---

    def _tables(self) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines [B,S,rotated/2] (or the cached ones [rows,rotated/2])."""
        it, pen, half = self.it, self.pen, self.it.rotated // 2
        if it.tables == "given":
            shape = ("batch", "sequence", half)
            return self._input("cos", shape), self._input("sin", shape)
        if it.tables == "looked_up":
            cos, sin = (
                pen.weight((f"{name}_table", (TABLE_ROWS, half))) for name in ("cos", "sin")
            )
            if it.rope_form == "op_cached":
                return cos, sin
            positions = self.inputs["position_ids"]
            return pen.op("Gather", cos, positions), pen.op("Gather", sin, positions)
        angles = self._angles(self.inputs["position_ids"])
        found = (pen.op(name, angles) for name in ("Cos", "Sin"))
        cos, sin = (pen.op("Cast", each, to=self.float) if it.fp16 else each for each in found)
        return cos, sin

    def _angles(self, positions: ir.Value) -> ir.Value:
        it, pen, half = self.it, self.pen, self.it.rotated // 2
        frequencies = pen.weight(("frequencies", (half,)))
        frequencies = pen.op("Cast", frequencies, to=ir.DataType.FLOAT) if it.fp16 else frequencies
        if it.positions == "mrope_early":
            return self._early(positions, frequencies)
        numbers = pen.op("Cast", pen.op("Unsqueeze", positions, pen.ints(-1)), to=ir.DataType.FLOAT)
        angles = pen.op("Mul", numbers, frequencies)
        if not it.is_mrope:
            return angles
        sections = [n for n in it.sections if n]
        if len(sections) == 1:
            return pen.op("Gather", angles, pen.ints(0, scalar=True), axis=0)
        parts = pen.op("Split", angles, pen.ints(*sections), axis=-1, outputs=len(sections))
        chosen = [
            pen.op("Gather", part, pen.ints(i, scalar=True), axis=0) for i, part in enumerate(parts)
        ]
        return pen.op("Concat", *chosen, axis=-1)

    def _early(self, positions: ir.Value, frequencies: ir.Value) -> ir.Value:
        """One component after the other."""
        pen, done, parts = self.pen, 0, []
        for component, count in enumerate(self.it.sections):
            if not count:
                continue
            own = pen.op(
                "Squeeze", pen.slice(positions, component, component + 1, axis=0), pen.ints(0)
            )
            numbers = pen.op("Cast", pen.op("Unsqueeze", own, pen.ints(2)), to=ir.DataType.FLOAT)
            parts.append(pen.op("Mul", numbers, pen.slice(frequencies, done, done + count, axis=0)))
            done += count
        return pen.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]

    def _rotate(self, states: ir.Value, tables: tuple[ir.Value, ir.Value], axis: int) -> ir.Value:
        """The first ``rotated`` features turned; heads on ``axis`` of four."""
        it, pen, width = self.it, self.pen, self.it.head_width
        turning = states if it.rotated == width else pen.slice(states, 0, it.rotated)
        cos, sin = (pen.op("Unsqueeze", table, pen.ints(axis)) for table in tables)
        turned = self._turn(turning, cos, sin)
        if it.rotated == width:
            return turned
        return pen.op("Concat", turned, pen.slice(states, it.rotated, FAR), axis=-1)

    def _turn(self, states: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        it, pen = self.it, self.pen
        if it.rope == "halves":
            low, high = pen.op("Split", states, outputs=2, axis=-1, num_outputs=2)
            cos, sin = (pen.op("Concat", each, each, axis=-1) for each in (cos, sin))
            other = pen.op("Concat", pen.op("Neg", high), low, axis=-1)
            return pen.op("Add", pen.op("Mul", states, cos), pen.op("Mul", other, sin))
        even, odd = (pen.slice(states, first, FAR, step=2) for first in (0, 1))
        low = pen.op("Sub", pen.op("Mul", even, cos), pen.op("Mul", odd, sin))
        high = pen.op("Add", pen.op("Mul", odd, cos), pen.op("Mul", even, sin))
        pairs = pen.op(
            "Concat", *(pen.op("Unsqueeze", each, pen.ints(-1)) for each in (low, high)), axis=-1
        )
        return pen.op("Reshape", pairs, pen.ints(0, 0, 0, it.rotated))

    def _rotary_op(
        self, states: ir.Value, tables: tuple[ir.Value, ir.Value], heads: int | None
    ) -> ir.Value:
        it = self.it
        cached = [self.inputs["position_ids"]] if it.rope_form == "op_cached" else []
        return self.pen.op(
            "RotaryEmbedding", states, *tables, *cached,
            interleaved=int(it.rope == "interleaved"),
            rotary_embedding_dim=it.rotated if it.partial else None, num_heads=heads,
        )  # fmt: skip

    # --- one layer ---

    def _layer(self, index: int, hidden: ir.Value, mask: ir.Value, tables: Tables) -> ir.Value:
        it, pen = self.it, self.pen
        before, after = (
            it.arrangement in ("pre", "sandwich"),
            it.arrangement in ("post", "sandwich"),
        )
        inner = self._norm(hidden, f"a{index}") if before else hidden
        mixed = self._attention(index, inner, mask, tables)
        mixed = self._scaled(self._norm(mixed, f"b{index}") if after else mixed)
        if it.mlp == "none":
            return self._outer(pen.op("Add", hidden, mixed), f"e{index}")
        source = hidden
        if not it.parallel:
            hidden = source = self._outer(pen.op("Add", hidden, mixed), f"e{index}")
        inner = self._norm(source, f"c{index}") if before else source
        fed = self._feed_forward(index, inner)
        fed = self._scaled(self._norm(fed, f"d{index}") if after else fed)
        hidden = pen.op("Add", hidden, mixed) if it.parallel else hidden
        return self._outer(pen.op("Add", hidden, fed), f"f{index}")

    def _outer(self, hidden: ir.Value, name: str) -> ir.Value:
        return self._norm(hidden, name) if self.it.arrangement == "outer" else hidden

    def _scaled(self, states: ir.Value) -> ir.Value:
        return self.pen.op("Mul", states, self.pen.number(0.5)) if self.it.multiplier else states

    def _norm(self, states: ir.Value, name: str, width: int | None = None) -> ir.Value:
        it, pen = self.it, self.pen
        scale = pen.weight((f"norm_{name}", (width or it.width,)))
        if it.norm == "layer":
            bias = pen.weight((f"shift_{name}", (width or it.width,)))
            return pen.op("LayerNormalization", states, scale, bias, axis=-1, epsilon=EPSILON)
        if it.norm == "rms":
            return pen.op("RMSNormalization", states, scale, axis=-1, epsilon=EPSILON)
        square = pen.op("Mul", states, states)
        mean = pen.op("ReduceMean", square, pen.ints(-1), keepdims=1)
        root = pen.op("Sqrt", pen.op("Add", mean, pen.number(EPSILON)))
        if it.norm == "rms_root":
            return pen.op("Mul", scale, pen.op("Div", states, root))
        factor = pen.op("Add", scale, pen.number(1.0)) if it.norm == "plus_one" else scale
        return pen.op("Mul", pen.op("Mul", states, pen.op("Reciprocal", root)), factor)

    def _linear(
        self, states: ir.Value, name: str, rows: int, *columns: tuple[str, int]
    ) -> ir.Value:
        pen = self.pen
        made = pen.op(
            "MatMul", states, pen.weight(*((f"{part}{name}", (rows, n)) for part, n in columns))
        )
        if not self.it.bias:
            return made
        return pen.op(
            "Add", pen.weight(*((f"bias_{part}{name}", (n,)) for part, n in columns)), made
        )

    def _project(self, index: int, states: ir.Value) -> list[ir.Value]:
        """Query, key and value [B,S,heads·width]."""
        it, pen = self.it, self.pen
        sizes = {
            "q": it.heads * it.head_width,
            "k": it.kv_heads * it.head_width,
            "v": it.kv_heads * it.value_width,
        }
        if it.qkv == "separate":
            return [self._linear(states, str(index), it.width, each) for each in sizes.items()]
        fused = self._linear(states, str(index), it.width, *sizes.items())
        if it.qkv == "split":
            return list(pen.op("Split", fused, pen.ints(*sizes.values()), axis=2, outputs=3))
        ends = np.cumsum([0, *sizes.values()]).tolist()
        return [pen.slice(fused, start, end) for start, end in itertools.pairwise(ends)]

    def _heads(self, states: ir.Value, name: str, count: int, tables: Tables) -> ir.Value:
        """[B,S,count·d] → turned [B,count,S,d]."""
        it, pen = self.it, self.pen
        form = it.rope_form if tables else None
        if form == "op_flat" and it.qk_norm == "none":
            states = self._rotary_op(states, tables or (states, states), count)
        states = pen.op("Reshape", states, pen.ints(0, 0, count, it.head_width))
        if it.qk_norm == "rows":
            states = self._norm(states, name, it.head_width)
        if form == "parts_rows":
            states = self._rotate(states, tables or (states, states), 2)
        states = pen.op("Transpose", states, perm=[0, 2, 1, 3])
        if it.qk_norm == "heads":
            states = self._norm(states, name, it.head_width)
        if form == "parts":
            return self._rotate(states, tables or (states, states), 1)
        if form in ("op", "op_cached") or (form == "op_flat" and it.qk_norm != "none"):
            return self._rotary_op(states, tables or (states, states), None)
        return states

    def _attention(self, index: int, states: ir.Value, mask: ir.Value, tables: Tables) -> ir.Value:
        it, pen = self.it, self.pen
        query, key, value = self._project(index, states)
        query = self._heads(query, f"q{index}", it.heads, tables)
        key = self._heads(key, f"k{index}", it.kv_heads, tables)
        value = pen.op("Reshape", value, pen.ints(0, 0, it.kv_heads, it.value_width))
        value = pen.op("Transpose", value, perm=[0, 2, 1, 3])
        whole = []
        for part, new, width in (("key", key, it.head_width), ("value", value, it.value_width)):
            name = f"{index}.{part}"
            past = self._input(f"past_key_values.{name}", ("batch", it.kv_heads, "past", width))
            joined = pen.op("Concat", past, new, axis=2)
            self._output(f"present.{name}", joined, ("batch", it.kv_heads, "total", width))
            whole.append(joined)
        scale = it.scale if it.scaled else None
        softcap = SOFTCAP if it.softcap else None
        mixed = pen.op("Attention", query, *whole, mask, scale=scale, softcap=softcap)
        mixed = pen.op("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = it.heads * it.value_width
        mixed = pen.op("Reshape", mixed, pen.ints(0, 0, flat))
        if it.output_gate:
            gate = pen.op("Sigmoid", self._linear(states, str(index), it.width, ("og", flat)))
            mixed = pen.op("Mul", mixed, gate)
        return self._linear(mixed, str(index), flat, ("o", it.width))

    def _feed_forward(self, index: int, states: ir.Value) -> ir.Value:
        it, pen, name = self.it, self.pen, str(index)
        inner = it.width + 2
        if it.mlp in ("tanh", "gelu"):
            wide = pen.op(it.mlp.title(), self._linear(states, name, it.width, ("up", inner)))
        else:
            gate, up = self._gates(states, name, inner)
            wide = pen.op("Mul", pen.op("Mul", gate, pen.op("Sigmoid", gate)), up)
        return self._linear(wide, name, inner, ("down", it.width))

    def _gates(self, states: ir.Value, name: str, inner: int) -> list[ir.Value]:
        rows = self.it.width
        if self.it.mlp == "gated":
            return [self._linear(states, name, rows, (part, inner)) for part in ("gate", "up")]
        both = self._linear(states, name, rows, ("gate", inner), ("up", inner))
        return list(self.pen.op("Split", both, axis=-1, num_outputs=2, outputs=2))
