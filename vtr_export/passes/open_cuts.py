"""Open the cuts that could drop nothing."""

from collections.abc import Collection

import onnx_ir as ir

from vtr_export import ops
from vtr_export.passes.build import Build

NARROW = "VtrNarrow"


class OpenCuts(ir.passes.InPlacePass):
    """Let every token through the cuts named, by number; what ranked them goes.

    Before::

        hidden', kept.J, vision_index' = vtr.VtrTopKPrune(query, keys, …, vision_index, …, hidden)
        stream' = vtr.VtrNarrow(stream, kept.J)

    After::

        kept.J = vtr.VtrColumns(hidden)         # 0 … S-1 in every row
        hidden' = hidden; vision_index' = vision_index; stream' = stream

    Inputs and outputs stay: a cut that is open shows what it keeps, and its stage has a past.
    """

    def __init__(self, cuts: Collection[int]) -> None:
        self.cuts = frozenset(cuts)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Open each; unknown numbers are nobody's cut."""
        build = Build(model, ops.Choice())
        found = [node for node in model.graph if self._is_meant(node)]
        for node in found:
            _open(build, node)
        return ir.passes.PassResult(model, modified=bool(found))

    def _is_meant(self, node: ir.Node) -> bool:
        if not ops.is_cut(node):
            return False
        number = (node.outputs[1].name or "").removeprefix("kept.")
        return number.isdecimal() and int(number) in self.cuts


def _open(build: Build, node: ir.Node) -> None:
    hidden, kept, vision_index = node.outputs[:3]
    for use in list(kept.uses()):
        if use.node.op_type == NARROW:
            narrowed, stream = use.node.outputs[0], use.node.inputs[0]
            assert stream is not None
            narrowed.replace_all_uses_with(stream)
    entry, index = node.inputs[-1], node.inputs[3]
    assert entry is not None
    assert index is not None
    hidden.replace_all_uses_with(entry)
    vision_index.replace_all_uses_with(index)
    build.prefix = (node.name or "cut").partition(".Vtr")[0]
    columns = build.call("VtrColumns", [entry], "columns")
    columns.type, columns.shape = kept.type, kept.shape
    kept.replace_all_uses_with(columns, replace_graph_outputs=True)
    columns.name, kept.name = kept.name, f"{kept.name}.closed"
