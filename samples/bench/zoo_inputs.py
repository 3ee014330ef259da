"""One image and a few words, as each architecture takes them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from zoo_config import BOS, IMAGE, IMAGE_SIZE, PATCH

Inputs = dict[str, Any]
BEFORE, AFTER = [BOS, 20, 21, 22], [23, 24, 25, 26, 27]  # words around an image


def inputs(model: PreTrainedModel, seed: int = 0) -> Inputs:
    """What ``model`` takes to see one image between words: ids, mask, pixels and their shapes."""
    generator = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    pixels = PIXELS.get(kind, _pixels_by_signature(model))(model.config, generator)
    tokens, image = image_tokens(model, pixels), image_id(model.config)
    ids = torch.tensor([[*BEFORE, *[image] * tokens, *AFTER]])
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    is_image = (ids == image).long()
    parameters = _parameters(model)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in parameters:
            known[name] = is_image
    if "moe_mm_token_type_ids" in parameters:
        known["moe_mm_token_type_ids"] = is_image
    return known | MORE.get(kind, lambda _, __: {})(model.config, ids)


def image_id(config: PretrainedConfig) -> int:
    """The token that an image's features replace."""
    return getattr(config, "image_token_id", None) or IMAGE


def image_tokens(model: PreTrainedModel, pixels: Inputs) -> int:
    """How many places the image takes in the prompt; 0 where it takes none."""
    if (fixed := TOKENS.get(model.config.model_type)) is not None:
        return fixed
    features = getattr(model, "get_image_features", None)
    if features is None:
        features = model.model.get_image_features
    with torch.no_grad():
        found = features(**pixels, return_dict=True)
    rows = found.pooler_output
    if rows is None:
        rows = found.last_hidden_state
    if rows is None:
        rows = found.deepstack_features[0][1]
    if isinstance(rows, (list, tuple)):
        return sum(row.shape[:-1].numel() for row in rows)
    return rows.shape[:-1].numel()


def _parameters(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(inspect.signature(type(model).forward).parameters)


def _pixels_by_signature(model: PreTrainedModel) -> Callable[..., Inputs]:
    taken = _parameters(model)
    for name, make in (("image_grid_thw", grid), ("pixel_attention_mask", masked_tiles)):
        if name in taken:
            return make
    return plain


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _vision(config: PretrainedConfig) -> PretrainedConfig:
    for name in ("vision_config", "encoder", "vlm_config"):
        if (part := getattr(config, name, None)) is not None:
            return part if name == "vision_config" else _vision(part)
    return config


def _size(config: PretrainedConfig) -> int:
    found = getattr(_vision(config), "image_size", None) or IMAGE_SIZE
    return found if isinstance(found, int) else found[0]


def plain(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, 3, H, W]."""
    side = _size(config)
    return {"pixel_values": _noise(generator, 1, 3, side, side)}


def grid(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [patches, values of a patch], image_grid_thw [1, 3]."""
    vision = config.vision_config
    side = IMAGE_SIZE // vision.patch_size
    values = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {
        "pixel_values": _noise(generator, side * side, values),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def sized(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, 3, H, W], image_sizes [1, 2]."""
    side = _size(config)
    return plain(config, generator) | {"image_sizes": torch.tensor([[side, side]])}


def anyres(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, tiles, 3, H, W], image_sizes [1, 2]: the whole and four tiles."""
    side = _size(config)
    return {
        "pixel_values": _noise(generator, 1, 5, 3, side, side),
        "image_sizes": torch.tensor([[2 * side, 2 * side]]),
    }


def masked_tiles(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, tiles, 3, H, W], pixel_attention_mask [1, tiles, H, W]."""
    side = _size(config)
    return {
        "pixel_values": _noise(generator, 1, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.bool),
    }


def tile_mask(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, tiles, 3, H, W], pixel_attention_mask [1, tiles]."""
    found = masked_tiles(config, generator)
    return found | {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def tile(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, images, 3, H, W]."""
    side = _size(config)
    return {"pixel_values": _noise(generator, 1, 1, 3, side, side)}


def kernels(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [patches, 3, patch, patch], image_grid_thw [1, 3]."""
    found, patch = grid(config, generator), config.vision_config.patch_size
    return found | {"pixel_values": found["pixel_values"].reshape(-1, 3, patch, patch)}


def temporal(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [patches, values of a patch over time], image_grid_thw [1, 3]."""
    found, vision = grid(config, generator), config.vision_config
    return found | {"pixel_values": found["pixel_values"].repeat(1, vision.patch_temporal)}


def merged_patches(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [merged patches, H, W, 3], image_grid_thw [1, 3]."""
    vision, side = config.vision_config, 4
    edge = vision.patch_size * vision.spatial_merge_size
    return {
        "pixel_values": _noise(generator, side * side, edge, edge, 3),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def patch_rows(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, patches, values of a patch], spatial_shapes [1, 2], mask [1, patches]."""
    side = IMAGE_SIZE // config.vision_config.patch_size
    return {
        "pixel_values": _noise(generator, 1, side * side, 3 * config.vision_config.patch_size**2),
        "spatial_shapes": torch.tensor([[side, side]]),
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long),
    }


def strip(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, 3, patch, patches * patch], target_sizes [1, 2]."""
    patch = config.vision_config.patch_size
    side = IMAGE_SIZE // patch
    return {
        "pixel_values": _noise(generator, 1, 3, patch, side * side * patch),
        "target_sizes": torch.tensor([[side, side]], dtype=torch.int32),
    }


def grid_hw(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [patches, values of a patch], image_grid_hw [1, 2]."""
    found = grid(config, generator)
    return {"pixel_values": found["pixel_values"], "image_grid_hw": found["image_grid_thw"][:, 1:]}


def positions(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, patches, values of a patch], image_position_ids [1, patches, 2] (x, y)."""
    vision = config.vision_config
    pool = getattr(vision, "pooling_kernel_size", 1)
    patch = getattr(vision, "model_patch_size", vision.patch_size)
    side = 4 * pool
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
    return {
        "pixel_values": torch.rand(1, side * side, 3 * patch**2, generator=generator),
        "image_position_ids": place[None],
    }


def two_sizes(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values and high_res_pixel_values [1, 3, H, W]."""
    side = config.high_res_vision_config.image_size
    return plain(config, generator) | {"high_res_pixel_values": _noise(generator, 1, 3, side, side)}


def asked(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, 3, H, W], qformer_input_ids [1, words]."""
    return plain(config, generator) | {"qformer_input_ids": torch.tensor([[20, 21, 22]])}


def video(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, frames, 3, H, W], qformer_input_ids [1, words]."""
    side = _size(config)
    return asked(config, generator) | {"pixel_values": _noise(generator, 1, 4, 3, side, side)}


def pooled(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [crops, patches, values], image_token_pooling [tokens, 4], image_grids."""
    side = IMAGE_SIZE // config.vision_config.patch_size
    index = torch.arange(side * side).reshape(side // 2, 2, side // 2, 2)
    return {
        "pixel_values": _noise(generator, 1, side * side, 3 * config.vision_config.patch_size**2),
        "image_token_pooling": index.transpose(1, 2).reshape(-1, 4),
        "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]]),
    }


def tiles_across(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, images, tiles, 3, H, W] , the aspect ratio, the tiles' mask."""
    side, tiles = _size(config), config.vision_config.max_num_tiles
    return {
        "pixel_values": _noise(generator, 1, 1, tiles, 3, side, side),
        "aspect_ratio_ids": torch.tensor([[6]]),  # 2 x 2
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
    }


def flattened(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """flattened_patches [1, patches, 2 + values of a patch]: row and column come first."""
    patch = PATCH
    side = IMAGE_SIZE // patch
    place = torch.cartesian_prod(torch.arange(1.0, side + 1), torch.arange(1.0, side + 1))
    values = _noise(generator, side * side, 3 * patch**2)
    return {"flattened_patches": torch.cat([place, values], dim=-1)[None]}


def square(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, 3, H, W]; the size is not in a vision_config."""
    return {"pixel_values": _noise(generator, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}


def patches(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, patches, values of a patch]."""
    return {"pixel_values": _noise(generator, 1, 16, 3 * config.patch_size**2)}


def blocks(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [patches, frames, H, W, 3]."""
    vision = config.vision_config
    edge = vision.patch_size
    return {"pixel_values": _noise(generator, 16, vision.temporal_patch_size, edge, edge, 3)}


def large(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, 3, H, W]: four strides of two leave 4 x 4 places."""
    return {"pixel_values": _noise(generator, 1, 3, 128, 128)}


def boxed(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, 3, H, W] and bbox [1, words, 4]."""
    words = len(BEFORE) + len(AFTER)
    return square(config, generator) | {"bbox": torch.rand(1, words, 4, generator=generator)}


def state(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """pixel_values [1, cameras, 3, H, W] and a robot's state, the noise and the time of a step."""
    size = config.chunk_size, config.max_action_dim
    return {
        "pixel_values": _noise(generator, 1, 1, 3, IMAGE_SIZE, IMAGE_SIZE),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        "state": _noise(generator, 1, config.max_state_dim),
        "noise": _noise(generator, 1, *size),
        "timestep": torch.tensor([0.5]),
    }


def nothing(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """No pixels."""
    return {}


PIXELS: dict[str, Callable[..., Inputs]] = {
    **dict.fromkeys(
        ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), anyres
    ),
    **dict.fromkeys(("mistral3", "mistral_large4", "lighton_ocr"), sized),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), strip),
    **dict.fromkeys(("gemma4", "gemma4_unified"), positions),
    **dict.fromkeys(("muse_glimmer", "muse_spark"), temporal),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), kernels),
    **dict.fromkeys(("mistral4", "evolla"), nothing),
    **dict.fromkeys(("kosmos-2.5", "pix2struct"), flattened),
    **dict.fromkeys(("chameleon",), square),
    "udop": boxed,
    "emu3": lambda *args: square(*args) | {"image_sizes": torch.tensor([[IMAGE_SIZE] * 2])},
    "deepseek_vl_hybrid": two_sizes,
    "diffusion_gemma": nothing,
    **dict.fromkeys(("florence2", "fast_vlm", "gemma3n"), large),
    "fuyu": patches,
    "granite_docling": tile_mask,
    "inkling_mm_model": blocks,
    "pi0": state,
    **dict.fromkeys(("idefics", "perception_lm"), tile),
    "inkling2": merged_patches,
    "instructblip": asked,
    "instructblipvideo": video,
    "lfm2_vl": patch_rows,
    "mllama": tiles_across,
    "molmo2": pooled,
    "nemotron_h_omni": grid_hw,
    "video_llama_3": lambda *args: grid(*args) | {"image_merge_sizes": torch.tensor([2])},
}
MORE: dict[str, Callable[..., Inputs]] = {
    "mllama": lambda config, ids: {
        "cross_attention_mask": torch.ones(*ids.shape, 1, config.vision_config.max_num_tiles)
    },
    "idefics": lambda config, ids: {"image_attention_mask": torch.ones(*ids.shape, 1)},
    **dict.fromkeys(
        ("kosmos-2", "kosmos-2.5"),
        lambda config, ids: {"image_embeds_position_mask": (ids == IMAGE).long()},
    ),
    "diffusion_gemma": lambda config, ids: {
        "decoder_input_ids": torch.arange(20, 20 + config.canvas_length)[None]
    },
    **dict.fromkeys(
        ("florence2", "pix2struct", "t5gemma2", "udop", "pp_formulanet", "vision-encoder-decoder"),
        lambda config, ids: {"decoder_input_ids": torch.tensor([[BOS, 20, 21, 22]])},
    ),
}
TOKENS = dict.fromkeys(
    (
        "blip",
        "git",
        "pix2struct",
        "pp_formulanet",
        "vision-encoder-decoder",
        "mistral4",
        "evolla",
        "diffusion_gemma",
        "udop",
    ),
    0,
)
TOKENS |= {
    "idefics": 1,
    "mllama": 1,
    "kosmos-2": 4,
    "kosmos-2.5": 4,
    "instructblipvideo": 16,
    "fuyu": 16,
    "pi0": 64,
}
