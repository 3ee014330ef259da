"""Images become what a vision encoder is fed, to the bit what transformers' processors give."""

from vtr_export.runtime.images.inputs import ByPrompt, ImageInputs, ImageKind, Seen
from vtr_export.runtime.images.kinds import PREPROCESSOR, PROCESSOR, read_kind
from vtr_export.runtime.images.picture import Picture, Video, load

__all__ = [
    "PREPROCESSOR",
    "PROCESSOR",
    "ByPrompt",
    "ImageInputs",
    "ImageKind",
    "Picture",
    "Seen",
    "Video",
    "load",
    "read_kind",
]
