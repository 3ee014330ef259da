"""The fp32 twin of a typed graph: every rounding and overflow happens where it can be seen."""

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vtr_export.errors import AnalysisError

TYPED = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOAT = ir.TensorType(ir.DataType.FLOAT)
SUFFIXES = RAW, ROUNDED, WIDE = ".raw", ".rounded", ".wide"  # what a value's name gets
_REPORT = "report the model: its typed graph cannot be checked yet"


class Widen(ir.passes.InPlacePass):
    """Compute every fp16 or bf16 operator in fp32, and round its result as it would be rounded.

    Before::

        y: float16 = MatMul(x: float16, weight: float16)

    After::

        y: float = Cast(Cast(MatMul(x: float, Cast(weight: float16)), to float16), to float)

    ONNX Runtime's CPU kernels compute fp16 in fp32 without rounding in between, and know no bf16;
    its optimiser keeps these pairs. Weights stay as they are stored. What happens inside one
    operator (the products of an Attention) stays in fp32.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find every typed value first, then put a pair behind each."""
        ShapeInferencePass(data_prop=False)(model)
        graph = model.graph
        for node in graph:
            _check(node)
        produced = [value for node in graph for value in node.outputs]
        values = (*graph.inputs, *graph.initializers.values(), *produced)
        typed = [v for v in values if v.dtype in TYPED and not _is_rounded(v)]
        for value in typed:
            _widen(graph, value)
        return ir.passes.PassResult(model, modified=bool(typed))


def _check(node: ir.Node) -> None:
    """AnalysisError for a node whose typed values could be missed."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    if any(attribute.type in kinds for attribute in node.attributes.values()):
        raise AnalysisError(
            f"node {node.name!r} ({node.op_type}) holds a graph of its own", hint=_REPORT
        )
    for value in node.outputs:
        if value.dtype is None and value.uses():
            message = f"the dtype of {value.name!r} ({node.op_type}) is unknown"
            raise AnalysisError(message, hint=_REPORT)


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    """Replace ``value`` for all who read it by its value in fp32, rounded to its own dtype."""
    producer, dtype = value.producer(), value.dtype
    assert dtype is not None
    chain = [ir.DataType.FLOAT] if _is_stored(value) else [dtype, ir.DataType.FLOAT]
    if len(chain) == 2:
        value.type = FLOAT
    readers = list(value.uses())
    casts, last = [], value
    for to in chain:
        cast = ir.Node("", "Cast", [last], [ir.AttrInt64("to", to)])
        last = cast.outputs[0]
        last.name = f"{value.name}{WIDE if to == ir.DataType.FLOAT else ROUNDED}"
        last.type, last.shape = ir.TensorType(to), value.shape
        cast.name = last.name
        casts.append(cast)
    for use in readers:
        use.node.replace_input_with(use.idx, last)
    if value.is_graph_output():
        name, value.name = value.name, f"{value.name}{RAW}"
        last.name = name
        graph.outputs[graph.outputs.index(value)] = last
    if producer is not None:
        graph.insert_after(producer, casts)
    elif len(graph):
        graph.insert_before(graph[0], casts)


def _is_rounded(value: ir.Value) -> bool:
    """True if the value is kept or rounded in its dtype, and read in fp32 only."""
    casts = (use.node for use in value.uses())
    wide = all(
        node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT
        for node in casts
    )
    return _is_stored(value) and wide and not value.is_graph_output()


def _is_stored(value: ir.Value) -> bool:
    """True if the value is made in its dtype whatever is read: a weight, a constant, a cast."""
    producer = value.producer()
    if producer is None:
        return value.is_initializer()
    return producer.op_type in ("Constant", "ConstantOfShape", "Cast")
