"""The model with cuts in plain PyTorch: what parity is measured against and search evaluates."""

from vtr_export.reference.cut import positions_of
from vtr_export.reference.decoder import Cache, Generation, Held, Reference, Step
from vtr_export.reference.inputs import embed, pad_batch, vision_index_of

__all__ = [
    "Cache",
    "Generation",
    "Held",
    "Reference",
    "Step",
    "embed",
    "pad_batch",
    "positions_of",
    "vision_index_of",
]
