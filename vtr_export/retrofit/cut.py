"""Cuts in a canonical decoder, its inputs as a client will feed them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir
import onnx_ir.passes.common as common

from vtr_export import __version__
from vtr_export.compile import run
from vtr_export.passes.derive_vision_index import DeriveVisionIndex
from vtr_export.passes.insert_cuts import InsertCuts
from vtr_export.passes.lower_embeddings import LowerEmbeddings
from vtr_export.retrofit.canonical import Decoder
from vtr_export.retrofit.embedding import MASK
from vtr_export.schedule import Resolved

GRAPH: Final = "decoder.onnx"
WEIGHTS: Final = "decoder.onnx.data"


@dataclass(frozen=True)
class Request:
    """What to cut, and how. ``image_tokens`` None: they depend on the image.

    Which tokens are an image's is told by ids (``image_token_id``), by the caller's ``vision_mask``
    [B,S], by the mask that ``embedding`` is made to say, or by ``vision_index`` [B,V].
    """

    onnx: Path
    schedule: Path
    out: Path
    image_tokens: int | None = None
    image_token_id: int | None = None
    tunable: bool = False
    verify: bool = True
    force: bool = False
    vision_mask: bool = False
    embedding: Path | None = None


def with_cuts(
    decoder: Decoder, schedule: Resolved | None, request: Request, *others: ir.passes.PassBase
) -> ir.Model:
    """A copy of the canonical decoder with the schedule's cuts, its inputs as they will be."""
    cuts = () if schedule is None else (InsertCuts(schedule, tunable=request.tunable),)
    model = run((*cuts, *others, LowerEmbeddings()), decoder.model.clone())
    if request.vision_mask:
        _ask_for_mask(model)
    model = run(
        (
            DeriveVisionIndex(None if request.vision_mask else request.image_token_id),
            common.RemoveUnusedNodesPass(),
            common.TopologicalSortPass(),
        ),
        model,
    )
    for value in list(model.graph.inputs):
        if value.name == "position_ids" and not value.uses():
            model.graph.inputs.remove(value)
    model.producer_name, model.producer_version = "vtr-export", __version__
    return model


def _ask_for_mask(model: ir.Model) -> None:
    """One more input, where there are cuts."""
    if any(value.name == "vision_index" for value in model.graph.inputs):
        mask = ir.val(MASK, ir.DataType.BOOL, ["batch", "sequence"])
        model.graph.inputs.append(mask)


def save(model: ir.Model, folder: Path) -> None:
    """Graph and weights, tensor by tensor."""
    ir.save(model, folder / GRAPH, external_data=WEIGHTS)
