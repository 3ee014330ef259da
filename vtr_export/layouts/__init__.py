"""Checkpoints that transformers does not read, seen as those that it does."""

from vtr_export.layouts.layout import Layout, find_layout

__all__ = ["Layout", "find_layout"]
