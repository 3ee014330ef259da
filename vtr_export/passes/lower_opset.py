"""Say that a graph is of an older opset, where it is."""

import onnx
import onnx_ir as ir

from vtr_export.errors import AnalysisError

IR_VERSIONS = {19: 9, 20: 9, 21: 10}  # of onnx 1.15 and 1.16, where these opsets came


class LowerOpset(ir.passes.InPlacePass):
    """Give the graph the opset ``version``, if each of its nodes means the same there.

    Before::

        <ir_version: 11, opset_import: ["": 24, "vtr": 1]>

    After::

        <ir_version: 9, opset_import: ["": 20]>

    Between 20 and 24 the operators that are in both gained types and attributes and changed
    nothing else; so a node may go back if the older schema has each of its attributes. Calls must
    be inlined before; functions that nobody calls go.
    """

    def __init__(self, version: int) -> None:
        self.version = version

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every node, then write the version down."""
        for node in model.graph:
            _check(node, self.version)
        wanted = {"": self.version}
        modified = dict(model.opset_imports) != wanted or bool(model.functions)
        model.functions.clear()
        model.opset_imports.clear()
        model.opset_imports.update(wanted)
        model.ir_version = IR_VERSIONS[self.version]
        return ir.passes.PassResult(model, modified=modified)


def _check(node: ir.Node, version: int) -> None:
    """AnalysisError for a call, and for what the older opset does not know or knows otherwise."""
    newer = f"node {node.name!r} ({node.op_type}) is newer than opset {version}"
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        raise AnalysisError(
            newer, hint="inline it, or write it out (passes/decompose.py)"
        ) from None
    extra = sorted(set(node.attributes) - set(schema.attributes))
    if extra:
        raise AnalysisError(f"{newer}: it has {extra[0]}", hint="write it out first")
