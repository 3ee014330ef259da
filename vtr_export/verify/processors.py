"""Transformers' own processors, as a verification asks them: for images and text."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto.processing_auto import processor_class_from_name

from vtr_export.runtime.processor_class import processor_class


def load_processor(checkpoint: Path, **options: Any) -> Any:
    """The checkpoint's whole processor, but for videos: their part needs torchvision."""
    name = processor_class(checkpoint)
    kind: Any = processor_class_from_name(name) or AutoProcessor
    if getattr(kind, "is_dummy", False) and name == "PixtralProcessor":
        return pixtral_processor().from_pretrained(checkpoint, local_files_only=True, **options)
    if "video_processor" in getattr(kind, "get_attributes", tuple)():
        kind = without_videos(kind)
    else:
        kind = AutoProcessor
    return kind.from_pretrained(checkpoint, local_files_only=True, **options)


def without_videos(kind: Any) -> Any:
    """A class of processors as ``kind``, whose video processor is left out."""
    parts = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: parts)})


def pixtral_processor() -> Any:
    """PixtralProcessor where torchvision is missing: of its image processor's file it needs a rule.

    The file of the pil backend has the same one.
    """
    package = "transformers.models.pixtral"
    missing = f"{package}.image_processing_pixtral"
    sys.modules[missing] = import_module(f"{package}.image_processing_pil_pixtral")
    try:
        return import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[missing]


def load_image_processor(checkpoint: Path) -> Callable[..., Any]:
    """The image processor with the pil backend, asked as the whole processor asks it."""
    images = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", local_files_only=True)
    try:
        whole = load_processor(checkpoint, backend="pil")
        asked = whole._merge_kwargs()["images_kwargs"]
    except (OSError, ValueError, TypeError, AttributeError):  # no whole processor, or a broken one
        return cast("Callable[..., Any]", images)

    def prepare(images: Any, return_tensors: str) -> Any:
        return whole._process_images(images, **{**asked, "return_tensors": return_tensors})[0]

    return prepare
