"""Let token ids, or a mask of the caller's, tell which tokens are an image's."""

import onnx_ir as ir

from vtr_export.errors import InputError
from vtr_export.ops import Choice
from vtr_export.passes.build import Build


class DeriveVisionIndex(ir.passes.InPlacePass):
    """Make ``vision_index`` of ``vision_mask``, or of the ids that are ``image_token_id``.

    Before::

        cut(…, vision_index)                # an input

    After::

        vision_index = where vision_mask, or input_ids == image_token_id, ascending     # [B,V]
        cut(…, vision_index)

    ``vision_mask`` [B,S] of this call, where the graph has such an input, goes before the ids.
    V is the most that a row has. A row with fewer begins with its leftmost pads, as a caller would
    fill it; where it lacks pads, an index is out of range and the call fails.
    """

    def __init__(self, image_token_id: int | None) -> None:
        self.image_token_id = image_token_id

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Nothing without either, or without cuts."""
        inputs = {value.name: value for value in model.graph.inputs}
        token, index = self.image_token_id, inputs.get("vision_index")
        build = Build(model, Choice(), "vision")
        if "vision_mask" not in inputs and token is None:
            return ir.passes.PassResult(model, modified=False)
        if "vision_mask" not in inputs and "input_ids" not in inputs:
            raise InputError(
                "the decoder takes no input_ids that could tell an image's tokens",
                where="--image-token-id",
                hint="give --embedding, or --vision-mask, or vision_index when it runs",
            )
        if index is None:
            return ir.passes.PassResult(model, modified=False)
        if "vision_mask" in inputs or token is None:
            told = _true(build, inputs["vision_mask"])
        else:
            told = _same(build, inputs["input_ids"], token)
        found = _derive(build, told, inputs["attention_mask"])
        index.replace_all_uses_with(found)
        model.graph.inputs.remove(index)
        found.shape, found.type = index.shape, index.type
        return ir.passes.PassResult(model, modified=True)


def _true(build: Build, mask: ir.Value) -> ir.Value:
    return build.op("Cast", [mask], "is_vision", to=int(ir.DataType.BOOL))


def _same(build: Build, ids: ir.Value, token: int) -> ir.Value:
    wanted = build.constant([token], "token")
    wide_ids = build.op("Cast", [ids], "ids", to=int(ir.DataType.INT64))
    return build.op("Equal", [wide_ids, wanted], "is_vision")


def _derive(build: Build, is_vision: ir.Value, mask: ir.Value) -> ir.Value:
    """Vision tokens rank before pads, pads by column; the V first of a row, ascending."""
    whole = int(ir.DataType.INT64)
    vision = build.op("Cast", [is_vision], "ones", to=whole)
    last = build.constant([1], "last")
    counts = build.op("ReduceSum", [vision, last], "counts", keepdims=0)
    width = build.op("ReduceMax", [counts], "width", keepdims=1)
    length = build.op("Shape", [is_vision], "length", start=1, end=2)
    current = build.call("VtrTail", [mask, length], "current")
    one, zero = build.constant([1], "one"), build.constant([0], "zero")
    row = build.op("Expand", [one, build.op("Shape", [is_vision], "size")], "row")
    column = build.op("CumSum", [row, build.op("Squeeze", [last], "axis")], "column")
    pads = build.op("Sub", [length, column], "pads")  # 0 … S-1, the leftmost most
    is_real = build.op("Cast", [current], "is_real", to=int(ir.DataType.BOOL))
    others = build.op("Where", [is_real, build.op("Sub", [zero, one], "never"), pads], "others")
    twice = build.op("Add", [length, length], "first")
    order = build.op("Where", [is_vision, twice, others], "order")
    ranks, places = _top(build, order, width, "chosen", largest=1)
    is_text = build.op("Less", [ranks, zero], "is_text")
    best = build.op("Where", [is_text, length, places], "best")
    return _top(build, best, width, "index", largest=0)[0]


def _top(
    build: Build, value: ir.Value, width: ir.Value, name: str, *, largest: int
) -> tuple[ir.Value, ir.Value]:
    attributes = [ir.AttrInt64("axis", 1), ir.AttrInt64("largest", largest)]
    node = ir.Node("", "TopK", [value, width], attributes, num_outputs=2)
    node.name = f"{build.prefix}.{name}"
    for output, what in zip(node.outputs, ("values", "places"), strict=True):
        output.name = f"{build.prefix}.{name}.{what}"
    build.graph.append(node)
    return node.outputs[0], node.outputs[1]
