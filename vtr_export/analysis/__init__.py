"""What a decoder graph is made of: token axes, attention sites, layers, and what a cut crosses."""

from vtr_export.analysis.axes import Axes, label_axes, token_seeds
from vtr_export.analysis.layers import Layer, find_layers
from vtr_export.analysis.sites import Site, Stream, find_sites

__all__ = [
    "Axes",
    "Layer",
    "Site",
    "Stream",
    "find_layers",
    "find_sites",
    "label_axes",
    "token_seeds",
]
