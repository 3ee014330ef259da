"""Transformers' own processors, as a verification asks them: for images and text."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto.processing_auto import processor_class_from_name

from vtr_export.runtime.processor_class import processor_class


def load_processor(checkpoint: Path, **options: Any) -> Any:
    """The checkpoint's whole processor, but for videos: their part needs torchvision."""
    kind: Any = processor_class_from_name(processor_class(checkpoint)) or AutoProcessor
    if "video_processor" in getattr(kind, "get_attributes", tuple)():
        kind = without_videos(kind)
    else:
        kind = AutoProcessor
    return kind.from_pretrained(checkpoint, local_files_only=True, **options)


def without_videos(kind: Any) -> Any:
    """A class of processors as ``kind``, whose video processor is left out."""
    parts = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: parts)})


def load_image_processor(checkpoint: Path) -> Callable[..., Any]:
    """The image processor with the pil backend, asked as the whole processor asks it."""
    images = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", local_files_only=True)
    try:
        asked = load_processor(checkpoint)._merge_kwargs()["images_kwargs"]
    except (OSError, ValueError, TypeError, AttributeError):  # no whole processor, or a broken one
        return cast("Callable[..., Any]", images)
    return partial(images, **{name: v for name, v in asked.items() if name != "return_tensors"})
