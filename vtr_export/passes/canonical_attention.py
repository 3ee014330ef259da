"""Write every attention of a foreign decoder in the one form that a cut can be put before."""

from collections.abc import Sequence

import onnx_ir as ir

from vtr_export.analysis.forms import Form, Rotary, find_forms
from vtr_export.ops import Choice
from vtr_export.passes.build import Build

STAND_IN = "mask"


class CanonicalAttention(ir.passes.InPlacePass):
    """Take attention operators to pieces, and leave the mask to ``AttachMask``.

    Before::

        rows, present_key, present_value = GroupQueryAttention(
            query, key, value, past_key, past_value, seqlens_k, total, cos_cache, sin_cache)

    After::

        query' = RotaryEmbedding(Transpose(Reshape(query)), cos, sin); key' the same way
        present_key = Concat(past_key, key'); present_value = Concat(past_value, value')
        heads = Attention(query', present_key, present_value, mask)
        rows = Reshape(Transpose(heads))

    Whoever calls it has shown that each mask is causal and blind to padding, nothing else: it is
    the stand-in input ``mask`` now. A rotation by implied positions reads ``position_ids``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find all forms first; a graph with one that cannot be written stays as it was."""
        forms = [form for form in find_forms(model.graph) if not _is_canonical(form)]
        if forms:
            _Writer(model).write(forms)
        return ir.passes.PassResult(model, modified=bool(forms))


def _is_canonical(form: Form) -> bool:
    names = [mask.value.name for mask in form.masks]
    return form.kind == "Attention" and names == [STAND_IN]


class _Writer:
    """The new nodes of one graph; tables and the mask are shared by all layers."""

    def __init__(self, model: ir.Model) -> None:
        self.graph, self.build = model.graph, Build(model, Choice())
        self.mask = self._input(STAND_IN, ["batch", 1, "sequence", "total"], ir.DataType.BOOL)
        self.tables: dict[tuple[ir.Value, ir.Value], ir.Value] = {}

    def _input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType) -> ir.Value:
        known = {value.name: value for value in self.graph.inputs}
        return known.get(name) or self.build.graph_input(name, shape, dtype)

    def write(self, forms: Sequence[Form]) -> None:
        for layer, form in enumerate(forms):
            self.build.prefix = f"attention.{layer}"
            self._write(form)

    def _write(self, form: Form) -> None:
        build = self.build
        query, key, value = self._projections(form)
        if form.rotary is not None:
            query = self._rotated(query, form.rotary, form.head_dim, "query")
            key = self._rotated(key, form.rotary, form.head_dim, "key")
        past = [self._heads_first(form, value, "past") for value in form.past]
        keys = build.op("Concat", [past[0], key], "keys", axis=2)
        values = build.op("Concat", [past[1], value], "values", axis=2)
        heads = build.op("Attention", [query, keys, values, self.mask], "heads")
        if form.scale is not None:
            node = heads.producer()
            assert node is not None
            node.attributes["scale"] = ir.AttrFloat32("scale", form.scale)
        rows = self._flat(heads, form) if form.is_flat else heads
        for old, new in ((form.output, rows), *zip(form.present, (keys, values), strict=True)):
            self._replace(old, new, form)

    def _replace(self, old: ir.Value, new: ir.Value, form: Form) -> None:
        """``new`` for all who read ``old``, and under its name where it is an output."""
        if old is not form.output and form.is_turned:
            new = self._turned(new, f"{new.name}.turned")
        new.type = new.type or old.type
        if old.is_graph_output():
            name, old.name = old.name, f"{old.name}.before"
            new.name, new.shape = name, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def _projections(self, form: Form) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Query, key and value [B,heads,S,d], before a rotation inside."""
        build, width = self.build, form.head_dim
        sizes = [form.heads * width, form.kv_heads * width, form.kv_heads * width]
        given = [form.query, form.key, form.value]
        if form.key is None or form.value is None:
            given = list(self._split(form.query, sizes, "packed"))
        if form.bias is not None:
            parts = self._split(form.bias, sizes, "bias", axis=0)
            given = [
                build.op("Add", [each, part], f"biased.{place}")
                for place, (each, part) in enumerate(zip(given, parts, strict=True))
                if each is not None
            ]
        names = ("query", "key", "value")
        counts = (form.heads, form.kv_heads, form.kv_heads)
        query, key, value = (
            self._unflat(each, count, width, name) if form.is_flat else each
            for each, count, name in zip(given, counts, names, strict=True)
            if each is not None
        )
        return (
            query,
            self._heads_first(form, key, "key"),
            self._heads_first(form, value, "value"),
        )

    def _split(
        self, value: ir.Value, sizes: Sequence[int], name: str, axis: int = 2
    ) -> Sequence[ir.Value]:
        sizes_value = self.build.constant(sizes, f"{name}.sizes")
        node = ir.Node(
            "", "Split", [value, sizes_value], [ir.AttrInt64("axis", axis)], num_outputs=len(sizes)
        )
        node.name = f"{self.build.prefix}.{name}"
        for place, part in enumerate(node.outputs):
            part.name = f"{self.build.prefix}.{name}.{place}"
        self.graph.append(node)
        return node.outputs

    def _unflat(self, value: ir.Value, heads: int, width: int, name: str) -> ir.Value:
        shape = self.build.constant([0, 0, heads, width], f"{name}.shape")
        rows = self.build.op("Reshape", [value, shape], f"{name}.rows")
        return self._turned(rows, name)

    def _flat(self, value: ir.Value, form: Form) -> ir.Value:
        shape = self.build.constant([0, 0, form.heads * form.head_dim], "rows.shape")
        return self.build.op("Reshape", [self._turned(value, "turned"), shape], "rows")

    def _heads_first(self, form: Form, value: ir.Value, name: str) -> ir.Value:
        return self._turned(value, f"{name}.{value.name}") if form.is_turned else value

    def _turned(self, value: ir.Value, name: str) -> ir.Value:
        """Axes 1 and 2 for one another."""
        node = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
        node.outputs[0].name = f"{self.build.prefix}.{name}"
        node.name = f"{self.build.prefix}.{name}.Transpose"
        self.graph.append(node)
        return node.outputs[0]

    def _rotated(self, value: ir.Value, rotary: Rotary, width: int, name: str) -> ir.Value:
        positions = rotary.positions or self._input(
            "position_ids", ["batch", "sequence"], ir.DataType.INT64
        )
        tables = [self._table(table, positions) for table in (rotary.cos, rotary.sin)]
        attributes = {"interleaved": int(rotary.is_interleaved)}
        turned = _width(rotary.cos)
        if turned not in (None, width):
            attributes["rotary_embedding_dim"] = turned or 0
        inputs = [value, *tables]
        return self.build.op("RotaryEmbedding", inputs, f"{name}.rotated", **attributes)

    def _table(self, table: ir.Value, positions: ir.Value) -> ir.Value:
        """The rows [B,S,d/2] of a table where this call's tokens stand."""
        if (table, positions) not in self.tables:
            prefix, self.build.prefix = self.build.prefix, "rotation"
            rows = self.build.op("Gather", [table, positions], f"rows.{table.name}", axis=0)
            self.tables[table, positions] = rows
            self.build.prefix = prefix
        return self.tables[table, positions]


def _width(table: ir.Value) -> int | None:
    """How many entries of a head a table [positions, n] turns: 2·n."""
    tensor = ir.convenience.get_const_tensor(table)
    shape = tensor.shape if tensor is not None else table.shape
    last = shape[-1] if shape is not None else None
    return 2 * last if isinstance(last, int) else None
