"""The model with cuts in plain PyTorch: what parity is measured against and search evaluates."""

from vtr_export.reference.crossing import Crossing, crossing_for
from vtr_export.reference.cut import positions_of
from vtr_export.reference.decoder import Reference
from vtr_export.reference.head import Head
from vtr_export.reference.inputs import (
    embed,
    embeddings,
    groups_for,
    image_features,
    pad_batch,
    positions_for,
    vision_index_of,
)
from vtr_export.reference.load import load_model
from vtr_export.reference.reducing import reduced_features
from vtr_export.reference.state import Cache, Generation, Held, Step

__all__ = [
    "Cache",
    "Crossing",
    "Generation",
    "Head",
    "Held",
    "Reference",
    "Step",
    "crossing_for",
    "embed",
    "embeddings",
    "groups_for",
    "image_features",
    "load_model",
    "pad_batch",
    "positions_for",
    "positions_of",
    "reduced_features",
    "vision_index_of",
]
