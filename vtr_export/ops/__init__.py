"""The operators we own: ONNX functions read from ``graphs/ops``, with bodies of standard ops.

A backend may replace a body with a fused kernel; it may not change what it computes.
"""

from vtr_export.ops.functions import BLOCK_SCORES, DOMAIN, Choice, declare, handed_on
from vtr_export.ops.masks import CAUSAL, CROSS, CROSS_ROWS, GROUPED, MASKS, groups_of, is_mask
from vtr_export.ops.prune import (
    CORRELATE,
    CUTS,
    PROTECT,
    PRUNE,
    RATER_RECYCLE,
    RATERS,
    RECYCLE,
    SCORED,
    THRESHOLD,
    is_cut,
    is_prune,
    narrowing,
    prune_attributes,
    scoring,
)

__all__ = [
    "BLOCK_SCORES",
    "CAUSAL",
    "CORRELATE",
    "CROSS",
    "CROSS_ROWS",
    "CUTS",
    "DOMAIN",
    "GROUPED",
    "MASKS",
    "PROTECT",
    "PRUNE",
    "RATERS",
    "RATER_RECYCLE",
    "RECYCLE",
    "SCORED",
    "THRESHOLD",
    "Choice",
    "declare",
    "groups_of",
    "handed_on",
    "is_cut",
    "is_mask",
    "is_prune",
    "narrowing",
    "prune_attributes",
    "scoring",
]
