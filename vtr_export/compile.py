"""The compiler on one page: what happens, in what order."""

from collections.abc import Iterable, Set
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from vtr_export.passes.attach_mask import AttachMask
from vtr_export.passes.fix_reshapes import FixReshapes
from vtr_export.passes.fold_constants import FoldConstants
from vtr_export.passes.fuse_norms import FuseNorms
from vtr_export.passes.fuse_rotary import FuseRotary
from vtr_export.passes.insert_cuts import InsertCuts
from vtr_export.passes.store_transposed import StoreTransposed
from vtr_export.schedule import Resolved

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
        InsertCuts(schedule, tunable=tunable),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )


def copied(shared: Set[str] = frozenset()) -> Passes:
    """The passes for weights that are copied: stored the way they are multiplied."""
    return (StoreTransposed(shared), common.RemoveUnusedNodesPass())


def run(
    passes: Iterable[ir.passes.PassBase], model: ir.Model, dump: Path | None = None
) -> ir.Model:
    """Apply each pass in turn; with ``dump``, leave a readable graph behind after each."""
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
