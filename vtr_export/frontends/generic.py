"""The vision encoder of an architecture without a graph of its own: its model's own accessor.

It is traced for one image of one size, the tower's own; grids and masks are constants. Where
``pixel_values`` [images, C, H, W] is all it takes, it is traced for any number of images.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Kosmos2Model

from vtr_export.frontends.concrete import Concrete
from vtr_export.frontends.families import qformer
from vtr_export.frontends.feeds import Feed
from vtr_export.frontends.pairs import Pairs
from vtr_export.frontends.remote import is_foreign
from vtr_export.frontends.shaped import Shaped

SIDE: Final = 448  # pixels, of towers that name no size; ten times this is as good
PLACED: Final = 16  # tokens of a side, of towers that are told where each patch stands
PROJECTED: Final = ("llama4",)  # by the model, not by its accessor
FRAMES: Final = 4  # of a video, as InstructBLIP takes it
GRID: Final = 32  # patches of a side, of towers that take images of any size

OWN: Final = {"instructblipvideo": qformer.asked_of_frames}
ADDED: Final = ("molmo2",)  # whose features are added to the words at their places


@dataclass(frozen=True)
class Taken:
    """What one image is to the accessor: what is fed, and what is constant."""

    feeds: Mapping[str, Feed]
    constants: Mapping[str, Tensor] = field(default_factory=dict)


def accessor(model: Any) -> Callable[..., Any]:
    """``get_image_features`` of the model or of the one inside it; or what stands for it here."""
    if (stands_for := OWN.get(model.config.model_type)) is not None:
        return partial(stands_for, model)
    if model.config.model_type == "kosmos-2":
        return partial(Kosmos2Model.get_image_features, model)
    own = getattr(model, "get_image_features", None)
    found: Callable[..., Any] = own or model.model.get_image_features
    return found


def encoded(model: Any, constants: Mapping[str, Tensor], **feeds: Tensor) -> Tensor:
    """[..., (1 + planes) D] of all images, in order."""
    with Concrete(), Shaped(), Pairs():
        said = accessor(model)(**feeds, **constants, return_dict=True)
        found = torch.cat([_one(each) for each in _laid(model, said)], dim=-1)
        return found + _word(model) if model.config.model_type in ADDED else found


def _word(model: Any) -> Tensor:
    """The embedding of the token that holds an image's place."""
    word: Tensor = model.get_input_embeddings()(torch.tensor(model.config.image_token_id))
    return word


def _laid(model: Any, said: Any) -> list[Tensor | list[Tensor]]:
    """What stands in the tokens' places, and the planes of later layers."""
    planes = list(getattr(said, "deepstack_features", None) or ())
    if planes and isinstance(planes[0], tuple) and isinstance(planes[0][0], int):  # layers
        by_layer = {layer: _one(found) for layer, found in planes}
        over = sorted(layer for layer in by_layer if layer)
        first = by_layer.get(0, torch.zeros_like(by_layer[over[0]]))
        decoder = model.get_decoder()
        return [first / decoder.embedding_multiplier, *(by_layer[layer] for layer in over)]
    rows = said.pooler_output if said.pooler_output is not None else said.last_hidden_state
    if model.config.model_type in PROJECTED:
        rows = model.multi_modal_projector(rows)
    return [rows, *planes]


def _one(found: Tensor | list[Tensor]) -> Tensor:
    return (
        found if isinstance(found, Tensor) else torch.cat([part.flatten(0, -2) for part in found])
    )


def taken(model: Any, dtype: torch.dtype) -> list[Taken]:
    """What the encoder may be traced on, the most general first."""
    names = signature(accessor(model)).parameters
    if (own := BY_TYPE.get(model.config.model_type)) is not None:
        return [own(model.config, dtype)]
    if "image_grid_thw" in names:
        return [grid(model.config, dtype)]
    side, channels = _side(_vision(model.config)), 3
    pixels = torch.empty(2, channels, side, side, dtype=dtype)
    one = Taken({"pixel_values": Feed(pixels[:1], (None,) * 4)})
    many = Taken({"pixel_values": Feed(pixels, ("images", None, None, None))})
    if "image_sizes" in names:
        sized = Taken(one.feeds, {"image_sizes": torch.tensor([[side, side]])})
        return [many, sized] if is_foreign(type(model)) else [sized]
    return [many, one]


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or getattr(config, "vq_config", None) or config


def _side(vision: Any) -> int:
    own = getattr(vision, "model_args", None) or {}  # timm's
    for name in ("image_size", "resolution", "img_size"):
        found = getattr(vision, name, own.get(name))
        if isinstance(found, (list, tuple)):
            found = found[0]
        if isinstance(found, int):
            return found
    return SIDE


def _first(vision: Any, *names: str, default: int) -> int:
    return next((int(v) for n in names if (v := getattr(vision, n, None)) is not None), default)


def grid(
    config: Any, dtype: torch.dtype, shape: Callable[..., tuple[int, ...]] | None = None
) -> Taken:
    """Patches in a row, and a constant ``image_grid_thw``."""
    vision = config.vision_config
    patch = vision.patch_size
    merge = _first(vision, "spatial_merge_size", "merge_size", default=2)
    if isinstance(getattr(vision, "image_size", None), int):
        side = vision.image_size // patch // merge * merge
    else:
        side = GRID // merge * merge
    channels = _first(vision, "in_channels", "in_chans", "num_channels", default=3)
    frames = _first(vision, "temporal_patch_size", "patch_temporal", default=1)
    values = (channels * frames * patch**2,) if shape is None else shape(channels, patch)
    pixels = torch.empty(side * side, *values, dtype=dtype)
    return Taken(
        {"pixel_values": Feed(pixels, (None,) * pixels.ndim)},
        {"image_grid_thw": torch.tensor([[1, side, side]])},
    )


def kernels(config: Any, dtype: torch.dtype) -> Taken:
    """Patches as small images."""
    return grid(config, dtype, lambda channels, patch: (channels, patch, patch))


def strided(config: Any, dtype: torch.dtype) -> Taken:
    """Patches, and how far they are merged."""
    found = grid(config, dtype)
    return Taken(found.feeds, {**found.constants, "image_merge_sizes": torch.tensor([2])})


def tiled(count: int, *, sizes: bool = False) -> Callable[[Any, torch.dtype], Taken]:
    """``pixel_values`` [1, tiles, C, H, W]: ``count`` tiles of one image."""

    def make(config: Any, dtype: torch.dtype) -> Taken:
        side = _side(_vision(config))
        pixels = torch.empty(1, count, 3, side, side, dtype=dtype)
        constants = {"image_sizes": torch.tensor([[2 * side, 2 * side]])} if sizes else {}
        return Taken({"pixel_values": Feed(pixels, (None,) * 5)}, constants)

    return make


def masked(config: Any, dtype: torch.dtype) -> Taken:
    """One tile, which is real."""
    found = tiled(1)(config, dtype)
    return Taken(found.feeds, {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)})


def words(config: Any, dtype: torch.dtype) -> Taken:
    """Pixels of which a codebook makes words, a row of them and a line break at a time."""
    side = GRID * 2 ** (len(config.vq_config.channel_multiplier) - 1)
    pixels = torch.empty(1, 3, side, side, dtype=dtype)
    return Taken(
        {"pixel_values": Feed(pixels, (None,) * 4)},
        {"image_sizes": torch.tensor([[side, side]])},
    )


def placed(config: Any, dtype: torch.dtype) -> Taken:
    """Patches [1, patches, values] of a square of tokens, and where each stands (x, y)."""
    vision = config.vision_config
    side = PLACED * _first(vision, "pooling_kernel_size", default=1)
    edge = _first(vision, "model_patch_size", "patch_size", default=1)
    if vision.model_type == "gemma4_unified_vision":
        side = PLACED
    at = torch.arange(side)
    pixels = torch.empty(1, side * side, 3 * edge**2, dtype=dtype)
    return Taken(
        {"pixel_values": Feed(pixels, (None,) * 3)},
        {"image_position_ids": torch.cartesian_prod(at, at).flip(-1)[None]},
    )


def asked(config: Any, dtype: torch.dtype) -> Taken:
    """Videos of ``FRAMES`` frames, and the tokens that a Q-Former reads of the question."""
    side, axes = _side(config.vision_config), ("images", "question")
    pixels = torch.empty(2, FRAMES, 3, side, side, dtype=dtype)
    return Taken(
        {
            "pixel_values": Feed(pixels, ("images", *[None] * 4)),
            "qformer_input_ids": Feed(torch.full((2, 3), 5), axes),
            "qformer_attention_mask": Feed(torch.ones(2, 3, dtype=torch.long), axes),
        }
    )


def two_sizes(config: Any, dtype: torch.dtype) -> Taken:
    """The same image twice: small and large."""
    sides = {
        "pixel_values": _side(config.vision_config),
        "high_res_pixel_values": _side(config.high_res_vision_config),
    }
    return Taken(
        {
            name: Feed(torch.empty(1, 3, side, side, dtype=dtype), (None,) * 4)
            for name, side in sides.items()
        }
    )


def rows(config: Any, dtype: torch.dtype) -> Taken:
    """``pixel_values`` [1, patches, values]: patches that go to the decoder as they are."""
    pixels = torch.empty(1, 16, 3 * config.patch_size**2, dtype=dtype)
    return Taken({"pixel_values": Feed(pixels, (None, None, None))})


def pooled(config: Any, dtype: torch.dtype) -> Taken:
    """Patches, and which four make one token."""
    vision = config.vision_config
    side = math.isqrt(vision.num_position_embeddings)
    edge = side % 2  # of no patch, behind the last row and column
    index = torch.full((side + edge, side + edge), -1)
    index[:side, :side] = torch.arange(side * side).reshape(side, side)
    half = (side + edge) // 2
    pixels = torch.empty(1, side * side, 3 * vision.patch_size**2, dtype=dtype)
    return Taken(
        {"pixel_values": Feed(pixels, (None,) * 3)},
        {
            "image_token_pooling": index.reshape(half, 2, half, 2).transpose(1, 2).reshape(-1, 4),
            "image_grids": torch.tensor([[half, half, 0, 0]]),
        },
    )


BY_TYPE: Final[Mapping[str, Callable[[Any, torch.dtype], Taken]]] = {
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), kernels),
    "instructblipvideo": asked,
    "video_llama_3": strided,
    **dict.fromkeys(("llava_next_video", "granite4_vision"), tiled(5, sizes=True)),
    "perception_lm": tiled(1),
    "granite_docling": masked,
    "emu3": words,
    **dict.fromkeys(("gemma4", "gemma4_unified"), placed),
    "deepseek_vl_hybrid": two_sizes,
    "fuyu": rows,
    "molmo2": pooled,
}
