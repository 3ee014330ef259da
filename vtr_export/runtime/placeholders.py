"""What a processor writes into a prompt where an image belongs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from vtr_export.errors import ArtifactError, InputError
from vtr_export.runtime.images import Seen


@dataclass(frozen=True)
class Placeholder:
    """``place`` stands for an image in a prompt; ``written`` is what it becomes.

    ``token`` is what is written once for each vision token. ``prompt``, where the processor writes
    whole prompts, makes one of a text and its number of images; a tokenizer adds nothing to it.
    ``leads``: the tokens of the one image stand before all that a tokenizer makes of the text.
    """

    place: str
    token: str
    written: Callable[[Seen], str]
    joined: Callable[[str], str] = str  # the whole text, once the images are written
    prompt: Callable[[str, int], str] | None = None
    leads: bool = False
    video: str | None = None  # stands for a video; it becomes image tokens too, which are replaced

    def places(self, text: str) -> list[str]:
        """Those in a text, in order."""
        known = [re.escape(place) for place in (self.place, self.video) if place is not None]
        return re.findall("|".join(known), text)


Special: TypeAlias = Mapping[str, str]  # the tokenizer's special tokens by name
Read: TypeAlias = Callable[[Special, Mapping[str, Any]], Placeholder]


def plain(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """The image token, so many times; ``config`` is ``processor_config.json``."""
    token = str(special.get("image_token") or config.get("image_token") or "<image>")
    return Placeholder(token, token, lambda image: token * image.tokens)


def with_videos(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """As an image; a video has a place of its own."""
    place = special.get("video_token") or config.get("video_token") or "<video>"
    return replace(plain(special, config), video=str(place))


def qwen_vl(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """The pad token, so many times; what stands around it is written in the prompt."""
    return plain({"image_token": "<|image_pad|>", **special}, config)


def got_ocr2(_: Special, config: Mapping[str, Any]) -> Placeholder:
    """A token of its class, so many times for each tile."""
    return plain({}, {**config, "image_token": "<imgpad>"})


def internvl(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """The context token, so many times, between start and end."""
    token = special.get("context_image_token", "<IMG_CONTEXT>")
    start = special.get("start_image_token", "<img>")
    end = special.get("end_image_token", "</img>")
    return Placeholder(token, token, lambda image: start + token * image.tokens + end)


def idefics(special: Special, _: Mapping[str, Any]) -> Placeholder:
    """One token for an image, between fake tokens that neighbours share and no space touches.

    InputError for an end of text behind an image: what follows it would not see the image.
    """
    token, fake = "<image>", "<fake_token_around_image>"
    bos, end = special.get("bos_token", ""), special.get("eos_token")

    def joined(text: str) -> str:
        if end and end in text.partition(token)[2]:
            raise InputError(
                f"the prompt has {end} behind an image",
                hint="leave it out: what stands behind it would not see the image",
            )
        if bos and text.startswith(bos):  # all of a prompt
            text = bos + text.removeprefix(bos).strip(" ")
        return re.sub(rf" *{re.escape(fake)} *", fake, text).replace(fake + fake, fake)

    def prompt(text: str, _: int) -> str:
        return bos + text.removeprefix(bos)

    written = fake + token + fake
    return Placeholder(token, token, lambda _: written, joined=joined, prompt=prompt)


def idefics2(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """The image token for each latent, between fake tokens that neighbours share."""
    token = special.get("image_token", "<image>")
    fake = special.get("image_boundary_token", "<fake_token_around_image>")
    tile = fake + token * int(config.get("image_seq_len") or 64) + fake
    latents = tile.count(token)

    def joined(text: str) -> str:
        return re.sub(rf"{re.escape(fake)}(?=[^\s<])", f"{fake} ", text.replace(fake + fake, fake))

    return Placeholder(token, token, lambda image: tile * (image.tokens // latents), joined=joined)


def pixtral(_: Special, config: Mapping[str, Any]) -> Placeholder:
    """The image token for each place of a row; a break between rows, and an end."""
    token = config.get("image_token") or "[IMG]"
    pause = config.get("image_break_token") or "[IMG_BREAK]"
    end = config.get("image_end_token") or "[IMG_END]"

    def written(image: Seen) -> str:
        assert image.grid is not None, "tokens lie in rows"
        _, rows, columns = image.grid
        return pause.join([token * columns] * rows) + end

    return Placeholder(token, token, written)


def gemma3(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """A start token stands for an image; tokens between start and end, and empty lines around."""
    start = special.get("boi_token", "<start_of_image>")
    end = special.get("eoi_token", "<end_of_image>")
    token = special.get("image_token", "<image_soft_token>")
    return Placeholder(start, token, lambda image: f"\n\n{start}{token * image.tokens}{end}\n\n")


def paligemma(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """All images come first, then the token that begins a text; a line ends it."""
    image = plain(special, config)

    def prompt(text: str, images: int) -> str:
        if image.place not in text:
            text = image.place * images + text
        head, place, tail = text.rpartition(image.place)
        return f"{head}{place}{special.get('bos_token', '<bos>')}{tail}\n"

    return replace(image, prompt=prompt)


def leading(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """The image token, so many times, before the text and what begins it."""
    return replace(plain(special, config), leads=True)


def idefics3(special: Special, _: Mapping[str, Any]) -> Placeholder:
    """A tile is led by its row and column, the image as a whole by a token of its own."""
    token = special.get("image_token", "<image>")
    fake = special.get("fake_image_token", "<fake_token_around_image>")
    whole = special.get("global_image_token", "<global-img>")

    def written(image: Seen) -> str:
        assert image.tiles is not None, "an image is cut into tiles"
        rows, columns = image.tiles
        each = token * (image.tokens // (rows * columns + 1))
        lines = [
            "".join(f"{fake}<row_{row + 1}_col_{column + 1}>{each}" for column in range(columns))
            for row in range(rows)
        ]
        cut = "\n".join([*lines, "", ""]) if lines else ""
        return f"{cut}{fake}{whole}{each}{fake}"

    return Placeholder(token, token, written)


def janus(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """The image token, so many times, between begin and end; its own system prompt is refused."""
    if config.get("use_default_system_prompt"):
        raise ArtifactError(
            "use_default_system_prompt puts a system prompt before every text",
            where="processor_config.json",
            hint="set it to false, and write the system prompt into the chat",
        )
    image = plain(special, config)
    start, end = special.get("boi_token", ""), special.get("eoi_token", "")
    return replace(image, written=lambda seen: start + image.written(seen) + end)


def aya(_: Special, config: Mapping[str, Any]) -> Placeholder:
    """Each tile is led by its number, the image as a whole by a token of its own."""
    place = config.get("image_token", "<image>")
    token = config.get("img_patch_token", "<|IMG_PATCH|>")
    start = config.get("start_of_img_token", "<|START_OF_IMG|>")
    end = config.get("end_of_img_token", "<|END_OF_IMG|>")
    tile, whole = config.get("tile_token", "TILE"), config.get("tile_global_token", "TILE_GLOBAL")
    patch = config.get("patch_size", 28) * config.get("downsample_factor", 1)
    each = token * (config.get("img_size", 364) // patch) ** 2

    def written(image: Seen) -> str:
        tiles = image.tokens * len(token) // len(each)
        cut = "".join(f"{tile}_{number}{each}" for number in range(1, tiles))
        return f"{start}{cut}{whole}{each}{end}"

    return Placeholder(place, token, written)


def mllama(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """One token for an image, whatever it becomes; a text begins behind the images in front."""
    image = plain({"image_token": "<|image|>", **special}, config)
    bos = special.get("bos_token", "")

    def prompt(text: str, _: int) -> str:
        rest = re.sub(rf"^({re.escape(image.place)})*", "", text)
        return text if bos in text else text[: len(text) - len(rest)] + bos + rest

    return replace(image, prompt=prompt, written=lambda _: image.token)


def nothing(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """An image leaves no token in the prompt."""
    return replace(plain(special, config), written=lambda _: "")


def one_place(special: Special, config: Mapping[str, Any]) -> Placeholder:
    """One token for an image, whatever it becomes."""
    image = plain(special, config)
    return replace(image, written=lambda _: image.token)


PLACEHOLDERS: Final[Mapping[str, Read]] = {  # by processor class
    **dict.fromkeys(("Blip2Processor", "InstructBlipProcessor"), leading),
    "Gemma3Processor": gemma3,
    "GotOcr2Processor": got_ocr2,
    "IdeficsProcessor": idefics,
    "Idefics2Processor": idefics2,
    "Idefics3Processor": idefics3,
    "InternVLProcessor": internvl,
    "LlavaOnevisionProcessor": with_videos,
    "JanusProcessor": janus,
    "AyaVisionProcessor": aya,
    "MllamaProcessor": mllama,
    "PixtralProcessor": pixtral,
    "VideoLlavaProcessor": with_videos,
    "VLoRAProcessor": nothing,
    "mPLUGOwl3Processor": one_place,
    "PaliGemmaProcessor": paligemma,
    "Qwen2VLProcessor": qwen_vl,
    "Qwen2_5_VLProcessor": qwen_vl,
    "Qwen3VLProcessor": qwen_vl,
    "SmolVLMProcessor": idefics3,
}


def read_placeholder(kind: str, special: Special, config: Mapping[str, Any]) -> Placeholder:
    """Of the processor class ``kind``."""
    return PLACEHOLDERS.get(kind, plain)(special, config)
