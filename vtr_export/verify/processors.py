"""Transformers' own processors, as a verification asks them: for images and text."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaImageProcessorPil,
    ProcessorMixin,
    VideoLlavaImageProcessor,
)
from transformers.models.auto.processing_auto import processor_class_from_name

from vtr_export.runtime.processor_class import processor_class


def load_processor(checkpoint: Path, **options: Any) -> Any:
    """The checkpoint's whole processor, but for videos: their part needs torchvision."""
    name = processor_class(checkpoint)
    kind: Any = processor_class_from_name(name) or AutoProcessor
    if getattr(kind, "is_dummy", False) and name == "PixtralProcessor":
        return pixtral_processor().from_pretrained(checkpoint, local_files_only=True, **options)
    if name == "IdeficsProcessor":
        idefics = with_places(kind).from_pretrained(checkpoint, local_files_only=True, **options)
        idefics.chat_template = idefics.tokenizer.chat_template  # which it would lose
        return idefics
    if "video_processor" in getattr(kind, "get_attributes", tuple)():
        kind = without_videos(kind)
    else:
        kind = AutoProcessor
    return kind.from_pretrained(checkpoint, local_files_only=True, **options)


class _WithoutNone(ProcessorMixin):  # type: ignore[misc]  # transformers has no types
    """Parts that are absent keep their place among the arguments, and are no attributes."""

    parts: Sequence[str] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*(arg for arg in args if arg is not None), **options)

    @classmethod
    def _get_arguments_from_pretrained(cls, *args: Any, **options: Any) -> list[Any]:
        loaded = super()._get_arguments_from_pretrained(*args, **options)
        named = dict(zip(cls.get_attributes(), loaded, strict=True))
        return [named.get(part) for part in cls.parts]


def without_videos(kind: Any) -> Any:
    """A class of processors as ``kind``, whose video processor is left out."""
    parts = kind.get_attributes()
    own = [part for part in parts if part != "video_processor"]
    fields = {"parts": parts, "get_attributes": classmethod(lambda _: own)}
    fields["video_processor"] = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM asks for them
    return type(kind.__name__, (kind, _WithoutNone), fields)


def with_places(kind: Any) -> Any:
    """IdeficsProcessor, which takes a list of texts and images, for texts with places of images."""

    def called(self: Any, images: Any = None, text: Any = None, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        each = images if images and isinstance(images[0], (list, tuple)) else [images or []]
        begin = self.tokenizer.bos_token
        prompts = [
            _in_order(one.removeprefix(begin).split("<image>"), own)
            for one, own in zip(texts, each, strict=True)
        ]
        return kind.__call__(self, text=prompts, **options)

    return type(kind.__name__, (kind,), {"__call__": called})


def _in_order(texts: Sequence[str], images: Sequence[Any]) -> list[Any]:
    """Texts with an image between each two; spaces alone are no text."""
    pairs = zip((text.strip(" ") for text in texts), [*images, None], strict=True)
    return [part for pair in pairs for part in pair if part is not None and part != ""]


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
    prepare = _named(_as_asked(images, checkpoint))
    if not images.to_dict().get("pad2square"):
        return prepare
    color = tuple(int(share * 255) for share in images.image_mean)

    def squared(images: Image.Image, return_tensors: str) -> Any:
        """OpenGVLab's first step, which the processor leaves out and LLaVA's has."""
        pixels = np.asarray(images.convert("RGB")).transpose(2, 0, 1)
        square = LlavaImageProcessorPil().pad_to_square(pixels, color).transpose(1, 2, 0)
        return prepare(images=Image.fromarray(square), return_tensors=return_tensors)

    return squared


def _named(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Idefics' gives pixel values alone."""

    def named(**asked: Any) -> Any:
        said = prepare(**asked)
        return {"pixel_values": said} if isinstance(said, np.ndarray) else said

    return named


def _as_asked(images: Any, checkpoint: Path) -> Callable[..., Any]:
    try:
        whole = load_processor(checkpoint, backend="pil")
        asked = whole._merge_kwargs()["images_kwargs"]
    except (ImportError, OSError, ValueError, TypeError, AttributeError):  # none, or a broken one
        return cast("Callable[..., Any]", images)

    if isinstance(images, VideoLlavaImageProcessor):
        asked["return_legacy_image_output"] = False  # pixel_values, as its model calls them
    if type(whole)._process_images is ProcessorMixin._process_images:
        return partial(images, **{name: v for name, v in asked.items() if name != "return_tensors"})

    is_listed = "multi_page" in signature(whole._process_images).parameters  # GOT-OCR 2 counts them

    def prepare(images: Any, return_tensors: str) -> Any:
        images = [images] if is_listed else images
        return whole._process_images(images, **{**asked, "return_tensors": return_tensors})[0]

    return prepare
