"""An export compiler that drops vision tokens inside the decoder, layer by layer."""

__version__ = "0.1.0"
