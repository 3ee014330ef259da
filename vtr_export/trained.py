"""Weights that only a reduction reads: a checkpoint must hold them, whole."""

from typing import Final

from vtr_export.checkpoint import Checkpoint
from vtr_export.errors import CheckpointError
from vtr_export.resolved import Resolved

PREFIX: Final = "vision_sampler."  # of their names, as reductions spell them


def check_trained(checkpoint: Checkpoint, schedule: Resolved) -> None:
    """CheckpointError where a reduction of ``schedule`` was not trained in ``checkpoint``."""
    tower = schedule.tower
    for number, reduction in enumerate(schedule.vision):
        assert tower is not None, "a schedule with reductions was fitted to a tower"
        for name, shape in reduction.weights(tower).items():
            ref = checkpoint.tensors.get(name)
            if ref is None or ref.shape != shape:
                found = "is not there" if ref is None else f"has shape {list(ref.shape)}"
                raise CheckpointError(
                    f"{reduction.method} is trained: {name} {list(shape)} {found}",
                    where=f"{checkpoint.folder}, for vision[{number}]",
                    hint="give a checkpoint that was trained with it, or take a reduction that "
                    "needs no training: prumerge, fastervlm, visionzip",
                )
        tower = reduction.leaves(tower)
