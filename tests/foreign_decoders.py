"""Random decoders with the attention of other exporters: to be looked at, not run."""

from typing import Any

import onnx_ir as ir
from decoder_writer import Builder, Tables, Weights
from random_decoders import Decoder

MICROSOFT = "com.microsoft"
KINDS = {
    "outside": "Attention",
    "inside": "Attention",
    "flat": "Attention",
    "grouped": "GroupQueryAttention",
    "packed": "GroupQueryAttention",
    "multi_head": "MultiHeadAttention",
    "added": "MatMul-Softmax-MatMul",
    "chosen": "MatMul-Softmax-MatMul",
}


class Foreign(Builder):
    """Attention ``form``, one of KINDS."""

    def __init__(self, decoder: Decoder, weights: Weights, form: str) -> None:
        super().__init__(decoder, weights)
        self.form = form

    def _attention(self, index: int, states: ir.Value, mask: ir.Value, tables: Tables) -> ir.Value:
        it = self.it
        if self.form == "outside":
            return super()._attention(index, states, mask, tables)
        flat = self._project(index, states)
        if self.form in ("added", "chosen"):
            mixed = self._written_out(index, flat, mask, tables)
        else:
            mixed = getattr(self, f"_{self.form}")(index, flat, mask)
        return self._linear(mixed, str(index), it.heads * it.value_width, ("o", it.width))

    def _past(self, index: int, part: str) -> ir.Value:
        it = self.it
        width = it.head_width if part == "key" else it.value_width
        return self._input(f"past.{index}.{part}", ("batch", it.kv_heads, "past", width))

    def _present(self, index: int, *values: ir.Value) -> None:
        for part, value in zip(("key", "value"), values, strict=True):
            self._output(f"present.{index}.{part}", value, ("batch", self.it.kv_heads, "all", "d"))

    def _split(self, states: ir.Value, count: int) -> ir.Value:
        pen = self.pen
        rows = pen.op("Reshape", states, pen.ints(0, 0, count, -1))
        return pen.op("Transpose", rows, perm=[0, 2, 1, 3])

    def _merge(self, mixed: ir.Value) -> ir.Value:
        pen = self.pen
        rows = pen.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return pen.op("Reshape", rows, pen.ints(0, 0, self.it.heads * self.it.value_width))

    def _inside(self, index: int, flat: list[ir.Value], mask: ir.Value) -> ir.Value:
        it, pasts = self.it, [self._past(index, part) for part in ("key", "value")]
        states = [
            self._split(x, n)
            for x, n in zip(flat, (it.heads, it.kv_heads, it.kv_heads), strict=True)
        ]
        mixed, *presents = self.pen.op("Attention", *states, mask, *pasts, outputs=3)
        self._present(index, *presents)
        return self._merge(mixed)

    def _flat(self, index: int, flat: list[ir.Value], mask: ir.Value) -> ir.Value:
        it, pasts = self.it, [self._past(index, part) for part in ("key", "value")]
        mixed, *presents = self.pen.op(
            "Attention",
            *flat,
            mask,
            *pasts,
            outputs=3,
            q_num_heads=it.heads,
            kv_num_heads=it.kv_heads,
        )
        self._present(index, *presents)
        return mixed

    def _lengths(self) -> list[ir.Value]:
        return [
            self._input("seqlens_k", ("batch",), ir.DataType.INT32),
            self._input("total_sequence_length", (), ir.DataType.INT32),
        ]

    def _grouped(self, index: int, flat: list[ir.Value], mask: ir.Value) -> ir.Value:
        it, pasts = self.it, [self._past(index, part) for part in ("key", "value")]
        mixed, *presents = self.pen.op(
            "GroupQueryAttention", *flat, *pasts, *self._lengths(), domain=MICROSOFT, outputs=3,
            num_heads=it.heads, kv_num_heads=it.kv_heads, local_window_size=7,
        )  # fmt: skip
        self._present(index, *presents)
        return mixed

    def _packed(self, index: int, flat: list[ir.Value], mask: ir.Value) -> ir.Value:
        it, pen, pasts = self.it, self.pen, [self._past(index, part) for part in ("key", "value")]
        tables = [
            pen.weight((f"{name}_cache", (64, it.head_width // 2))) for name in ("cos", "sin")
        ]
        mixed, *presents = pen.op(
            "GroupQueryAttention", pen.op("Concat", *flat, axis=-1), None, None, *pasts,
            *self._lengths(), *tables, domain=MICROSOFT, outputs=3, do_rotary=1,
            num_heads=it.heads, kv_num_heads=it.kv_heads,
        )  # fmt: skip
        self._present(index, *presents)
        return mixed

    def _multi_head(self, index: int, flat: list[ir.Value], mask: ir.Value) -> ir.Value:
        pasts = [self._past(index, part) for part in ("key", "value")]
        bias = self.pen.op("Cast", mask, to=self.float)
        mixed, *presents = self.pen.op(
            "MultiHeadAttention", *flat, None, None, bias, *pasts,
            domain=MICROSOFT, outputs=3, num_heads=self.it.heads,
        )  # fmt: skip
        self._present(index, *presents)
        return mixed

    def _written_out(
        self, index: int, flat: list[ir.Value], mask: ir.Value, tables: Tables
    ) -> ir.Value:
        """MatMul, Softmax, MatMul; shared keys are expanded to each head."""
        it, pen = self.it, self.pen
        query = self._heads(flat[0], f"q{index}", it.heads, tables)
        new = [
            self._heads(flat[1], f"k{index}", it.kv_heads, tables),
            self._split(flat[2], it.kv_heads),
        ]
        whole = [
            pen.op("Concat", self._past(index, part), value, axis=-2)
            for part, value in zip(("key", "value"), new, strict=True)
        ]
        self._present(index, *whole)
        keys, values = (self._repeated(each) for each in whole)
        turned = pen.op("Transpose", keys, perm=[0, 1, 3, 2])
        logits = pen.op("Mul", pen.op("MatMul", query, turned), pen.number(it.scale))
        odds = pen.op("Softmax", self._hidden(logits, mask), axis=-1)
        return self._merge(pen.op("MatMul", odds, values))

    def _hidden(self, logits: ir.Value, mask: ir.Value) -> ir.Value:
        low = self.pen.number(-60000.0)
        if self.form == "chosen":
            return self.pen.op("Where", mask, logits, low)
        return self.pen.op("Add", logits, self.pen.op("Where", mask, self.pen.number(0.0), low))

    def _repeated(self, states: ir.Value) -> ir.Value:
        it, pen = self.it, self.pen
        if it.group == 1:
            return states
        wide = pen.op("Unsqueeze", states, pen.ints(2))
        wide = pen.op("Expand", wide, pen.ints(1, 1, it.group, 1, 1))
        return pen.op("Reshape", wide, pen.ints(0, it.heads, -1, self._width(states)))

    def _width(self, states: ir.Value) -> int:
        producer: Any = states.producer()
        return int(producer.inputs[0].shape[-1])


def foreign(decoder: Decoder, weights: Weights, form: str) -> ir.Model:
    """No shape but those of inputs and outputs."""
    model = Foreign(decoder, weights, form).model()
    model.graph.opset_imports[MICROSOFT] = 1
    return model
