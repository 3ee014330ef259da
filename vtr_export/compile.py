"""The compiler on one page: what happens, in what order."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import onnx_ir.passes.common as common

from vtr_export.passes.allow_unfused import AllowUnfused
from vtr_export.passes.attach_mask import AttachMask
from vtr_export.passes.cast_linked import CastLinked
from vtr_export.passes.compact_cache import GRAPH as COMPACTION
from vtr_export.passes.compact_cache import compact_cache
from vtr_export.passes.decompose import Decompose
from vtr_export.passes.fix_reshapes import FixReshapes
from vtr_export.passes.fold_constants import FoldConstants
from vtr_export.passes.fuse_norms import FuseNorms
from vtr_export.passes.fuse_rotary import FuseRotary
from vtr_export.passes.insert_cross_cuts import InsertCrossCuts
from vtr_export.passes.insert_cuts import InsertCuts
from vtr_export.passes.lower_opset import LowerOpset
from vtr_export.passes.open_cuts import OpenCuts
from vtr_export.passes.reduce_vision import ReduceVision
from vtr_export.passes.scale_queries import ScaleQueries
from vtr_export.passes.store_transposed import StoreTransposed
from vtr_export.passes.unroll_loops import UnrollLoops
from vtr_export.schedule import Resolved
from vtr_export.tensorrt_10 import OPSET
from vtr_export.weights import CheckpointTensor

if TYPE_CHECKING:
    from vtr_export.frontends.transformers import Graphs

Passes = tuple[ir.passes.PassBase, ...]


def canonical() -> Passes:
    """The passes every traced graph goes through."""
    return (
        FoldConstants(),
        common.CommonSubexpressionEliminationPass(),
        FuseNorms(),
        FixReshapes(),
        FuseRotary(),
        common.RemoveUnusedNodesPass(),
    )


def decoder(schedule: Resolved, *, tunable: bool = False) -> Passes:
    """The passes that make a decoder keep what ``schedule`` says."""
    return (
        *canonical(),
        AttachMask(),
        (InsertCrossCuts if schedule.crosses else InsertCuts)(schedule, tunable=tunable),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )


def vision_encoder(
    schedule: Resolved, held: Mapping[str, ir.TensorProtocol] | None = None
) -> Passes:
    """The passes that make a vision encoder give fewer tokens, as ``schedule`` says.

    ``held``: weights that only reductions read, by name.
    """
    if schedule.tower is None or not schedule.vision:
        return canonical()
    return (
        *canonical(),
        ReduceVision(schedule.vision, schedule.tower, held),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )


def copied(shared: Set[str] = frozenset()) -> Passes:
    """The passes for weights that are copied: stored the way they are multiplied."""
    return (StoreTransposed(shared), common.RemoveUnusedNodesPass())


def linked() -> Passes:
    """The passes for weights that stay in the checkpoint: as they are stored."""
    return (CastLinked(), common.TopologicalSortPass())


def engine(opened: Collection[int] = ()) -> Passes:
    """The passes between an artifact's graph and TensorRT; ``opened`` cuts can drop nothing."""
    return (
        OpenCuts(opened),
        UnrollLoops(),
        ScaleQueries(),
        AllowUnfused(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )


def tensorrt_10() -> Passes:
    """The passes between an artifact's graph and TensorRT 10: no function, no newer operator."""
    return (
        common.InlinePass(),
        UnrollLoops(),
        Decompose(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        LowerOpset(OPSET),
        common.TopologicalSortPass(),
    )


def lower(
    graphs: "Graphs",
    schedule: Resolved,
    *,
    weights: str,
    tunable: bool = False,
    dump: Path | None = None,
) -> dict[str, ir.Model]:
    """The traced graphs, pruned and ready for their weights: file stem → model."""
    shared = shared_weights(graphs)
    lowered: dict[str, ir.Model] = {}
    for name, model in graphs.parts().items():
        first = canonical()
        if model is graphs.decoder:
            first = decoder(schedule, tunable=tunable)
        elif model is graphs.vision_encoder:
            first = vision_encoder(schedule, graphs.held)
        last = linked() if weights == "link" else copied(shared)
        folder = dump / name if dump is not None else None
        passes = (*first, *last, common.ClearMetadataAndDocStringPass())
        lowered[name] = run(passes, model, folder)
        if model is graphs.decoder and schedule.decode:
            compaction = compact_cache(lowered[name])
            lowered |= {} if compaction is None else {COMPACTION: compaction}
    return lowered


def shared_weights(graphs: "Graphs") -> frozenset[str]:
    """Checkpoint tensors that several parts use (tied embeddings): stored once, as they are."""
    uses = Counter(
        name
        for model in graphs.parts().values()
        for name in {
            value.const_value.ref.name
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, CheckpointTensor)
        }
    )
    return frozenset(name for name, count in uses.items() if count > 1)


def run(
    passes: Iterable[ir.passes.PassBase], model: ir.Model, dump: Path | None = None
) -> ir.Model:
    """Apply each pass in turn; with ``dump``, leave a readable graph behind after each."""
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(passes):
        name = type(step).__name__
        try:
            model = step(model).model
        except Exception as error:
            error.add_note(f"while running pass {number} ({name})")
            raise
        if dump is not None:
            text = ir.to_onnx_text(model, exclude_initializers=True)
            (dump / f"{number:02}_{name}.onnxtxt").write_text(text, encoding="utf-8")
    return model
