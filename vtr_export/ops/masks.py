"""The masks of attention: made anew, not gathered, wherever a stage begins."""

from typing import Final

import onnx_ir as ir

from vtr_export.ops.functions import DOMAIN

CAUSAL: Final = "VtrCausalMask"
"""(padding [B,T], hidden [B,S,D]) → mask [B,1,S,T]: real keys up to a row, and always itself."""
GROUPED: Final = "VtrGroupMask"
"""(padding, row_groups [B,S], groups [B,G]) → the same, and all of a row's group but group 0.

The rows are the last S of this call's G.
"""
CROSS: Final = "VtrCrossMask"
"""(past [B,P], seen [B,S,V] bool) → mask [B,1,S,P + V]: those, and key 0 for who sees none."""
CROSS_ROWS: Final = "VtrCrossRows"
"""(past, seen, rows [B,S]) → [B,S,1] bool: rows that count and see a key."""
MASKS: Final = (CAUSAL, CROSS, GROUPED)


def is_mask(node: ir.Node) -> bool:
    """Whether ``node`` makes one."""
    return node.domain == DOMAIN and node.op_type in MASKS


def groups_of(mask: ir.Value) -> ir.Value | None:
    """The groups that ``mask`` was made of, if any."""
    node = mask.producer()
    return node.inputs[2] if node is not None and node.op_type == GROUPED else None
