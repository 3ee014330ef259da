"""The graph that makes a decoder's embeddings: it knows which ids are the places of an image."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir
import onnx_ir.passes.common as common

from vtr_export.errors import InputError
from vtr_export.retrofit.canonical import load
from vtr_export.retrofit.check import check_file

GRAPH: Final = "embedding.onnx"
MASK: Final = "vision_mask"
SAME: Final = ("Cast", "Identity")  # what leaves ids as they are


@dataclass(frozen=True)
class Embedding:
    """A graph that also says where an image's tokens stand: ``vision_mask`` bool [B,S]."""

    model: ir.Model
    image_token_id: int

    def save(self, folder: Path) -> None:
        """Graph and weights, tensor by tensor."""
        ir.save(self.model, folder / GRAPH, external_data=f"{GRAPH}.data")


def read_embedding(file: Path, token: int | None) -> Embedding:
    """The graph of ``file``, told to say ``ids == token``; None: the id that it looks for itself.

    Raises InputError where it is not safe to read, has no ids, or looks for no id or for several.
    """
    check_file(file)
    model = load(file)
    common.InlinePass()(model)
    ids = _ids(model.graph, file)
    token = _token(ids, file) if token is None else token
    wanted = ir.node("Constant", [], attributes={"value_ints": [token]})
    wide = ir.node("Cast", [ids], attributes={"to": ir.DataType.INT64})
    told = ir.node("Equal", [wide.outputs[0], wanted.outputs[0]])
    mask = told.outputs[0]
    mask.name, mask.shape, mask.dtype = MASK, ids.shape, ir.DataType.BOOL
    model.graph.extend([wanted, wide, told])
    model.graph.outputs.append(mask)
    return Embedding(model, token)


def _ids(graph: ir.Graph, file: Path) -> ir.Value:
    """The one input of whole numbers [B,S]."""
    whole = (ir.DataType.INT64, ir.DataType.INT32)
    found = [v for v in graph.inputs if v.dtype in whole and v.shape and len(v.shape) == 2]
    named = [value for value in found if value.name == "input_ids"] or found
    if len(named) != 1:
        raise InputError(
            "no input can be told to be the token ids",
            where=str(file),
            hint="name it input_ids, int64 [batch, sequence]",
        )
    return named[0]


def _token(ids: ir.Value, file: Path) -> int:
    """The number that ids are compared with."""
    found = sorted(set(_compared(ids)))
    if len(found) != 1:
        said = f"the ids {', '.join(map(str, found))}" if found else "no id"
        raise InputError(
            f"the graph looks for {said}, where one should be an image's",
            where=str(file),
            hint="say which: --image-token-id ID",
        )
    return found[0]


def _compared(ids: ir.Value) -> Iterator[int]:
    """Numbers that ``Equal`` holds beside the ids."""
    same = [ids]
    for value in same:
        for use in value.uses():
            node = use.node
            if node.op_type in SAME:
                same.append(node.outputs[0])
            elif node.op_type == "Equal":
                other = node.inputs[1 - use.idx]
                tensor = ir.convenience.get_const_tensor(other) if other is not None else None
                if tensor is not None and tensor.size == 1:
                    yield int(tensor.numpy().item())
