"""Where the layers of a model's decoder are."""

from typing import Any

from vtr_export.models.idefics import Interleaved


def point_at_layers(model: Any) -> None:
    """Have ``get_decoder`` give the stack of layers where it gives a language model around it."""
    if model.config.model_type == "idefics":
        stack = Interleaved(model.model)
        model.get_decoder = lambda: stack
        return
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers"):
        inner = decoder.get_decoder()
        inner = getattr(decoder, "model", decoder) if inner is decoder else inner
        if inner is decoder:
            break
        decoder = inner
    model.get_decoder = lambda: decoder
