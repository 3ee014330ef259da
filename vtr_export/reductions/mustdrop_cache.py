"""MustDrop's output-aware cache: after the prefill, what later layers dropped goes everywhere."""

from __future__ import annotations

from typing import ClassVar, Literal

from vtr_export.reductions.reduction import Reduction


class OutputAwareCache(Reduction):
    """Every layer behind the first cut keeps only the keys and values of the last stage's tokens.

    arXiv 2411.10803, section 3.4.
    """

    PAPER: ClassVar[str] = "2411.10803"
    method: Literal["mustdrop"] = "mustdrop"
