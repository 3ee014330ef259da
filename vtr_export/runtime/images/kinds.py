"""Which way a checkpoint prepares its images: told by the processor's class."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from vtr_export.errors import ArtifactError
from vtr_export.runtime.images import (
    anyres,
    fitted,
    idefics2,
    idefics3,
    mllama,
    patches,
    pixtral,
    plain,
    tiles,
    video_llava,
)
from vtr_export.runtime.images.inputs import ImageKind
from vtr_export.runtime.json_files import read_json
from vtr_export.runtime.processor_class import processor_class

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
VIDEOS = "video_preprocessor_config.json"
# of the processor's class, its JSON without nulls, and that file's name; what it raises of the
# kinds KeyError, TypeError and ValueError says that the file makes no sense
Read = Callable[[str, Mapping[str, Any], str], ImageKind]
KINDS: Final[Mapping[str, Read]] = {
    **dict.fromkeys(plain.PROCESSORS, plain.ImageFacts.read),
    **dict.fromkeys(fitted.PROCESSORS, fitted.SquareFacts.read),
    **dict.fromkeys(idefics2.PROCESSORS, idefics2.SplitFacts.read),
    **dict.fromkeys(idefics3.PROCESSORS, idefics3.CutFacts.read),
    **dict.fromkeys(mllama.PROCESSORS, mllama.CanvasFacts.read),
    **dict.fromkeys(pixtral.PROCESSORS, pixtral.EdgeFacts.read),
    "LlavaNextImageProcessor": anyres.AnyresFacts.read,
    "LlavaOnevisionImageProcessor": anyres.OnevisionFacts.read,
    **dict.fromkeys(patches.PROCESSORS, patches.PatchFacts.read),
    **dict.fromkeys(video_llava.PROCESSORS, video_llava.TwoTowers.read),
    **dict.fromkeys(tiles.PROCESSORS, tiles.TileFacts.read),
}
ASKED: Final[Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]]] = {
    # what a whole processor, of this processor_config.json, asks of its image processor
    "Gemma3Processor": lambda _: {"do_convert_rgb": True, "do_pan_and_scan": False},
    "AyaVisionProcessor": lambda _: {"crop_to_patches": True},
    "InternVLProcessor": lambda _: {"crop_to_patches": True},
    "LlavaOnevisionProcessor": lambda whole: {"video_processor": whole.get("video_processor")},
    "PixtralProcessor": pixtral.asked,
    "VideoLlavaProcessor": lambda whole: {"video_processor": whole.get("video_processor")},
}


def read_kind(folder: Path) -> ImageKind:
    """From ``processor_config.json`` or ``preprocessor_config.json``, as transformers looks.

    ArtifactError when neither says anything of images, and for facts we cannot follow.
    """
    whole = {"video_processor": read_json(folder / VIDEOS), **read_json(folder / PROCESSOR)}
    ask = ASKED.get(processor_class(folder))
    for name in (PROCESSOR, PREPROCESSOR):
        facts = whole.get("image_processor") if name == PROCESSOR else read_json(folder / name)
        if facts:
            return parse_kind({**facts, **(ask(whole) if ask else {})}, str(folder / name))
    raise ArtifactError(
        "the artifact does not say how images are prepared",
        where=str(folder),
        hint=f"put the checkpoint's {PREPROCESSOR} there, or export from a folder with it",
    )


def parse_kind(config: Mapping[str, Any], where: str) -> ImageKind:
    """From an image processor's own JSON; a model without a class takes LLaVA's."""
    legacy = str(config.get("feature_extractor_type", "LlavaImageProcessor"))
    named = str(config.get("image_processor_type") or legacy)
    kind = named.replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in KINDS:
        raise ArtifactError(
            f"image processor {named!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(sorted(KINDS))}",
        )
    said = {name: value for name, value in config.items() if value is not None}
    try:
        return KINDS[kind](kind, said, where)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the image processor's facts make no sense: {error!r}",
            where=where,
            hint="take the file from the checkpoint again",
        ) from error
