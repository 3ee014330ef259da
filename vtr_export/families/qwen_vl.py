"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images keep their size, patches merge, positions are triples."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, Section, image_token, section_of

LEARNED: Final = 48**2  # positions, where a file of Qwen3-VL does not say how many


def qwen2_vl(config: Config, where: str) -> ModelFacts:
    """LayerNorms, a plain MLP and full attention in the tower."""
    config = _unfolded(config)
    _, vision = section_of(config, "vision_config", "qwen2_vl_vision", where)
    width, out = vision.size("embed_dim"), vision.size("hidden_size")
    inner = int(width * vision.values["mlp_ratio"])
    norms, mlp = 4 * width, 2 * width * inner + inner + width
    tower = _tower(vision, width, inner, norms + mlp)
    return _facts("qwen2_vl", config, where, tower, out, merger_norm=2 * width)


def qwen2_5_vl(config: Config, where: str) -> ModelFacts:
    """RMSNorms, a gated MLP and window attention in the tower."""
    config = _unfolded(config)
    _, vision = section_of(config, "vision_config", "qwen2_5_vl_vision", where)
    width, out = vision.size("hidden_size"), vision.size("out_hidden_size")
    inner = vision.size("intermediate_size")
    norms, mlp = 2 * width, 3 * width * inner + 2 * inner + width
    tower = _tower(vision, width, inner, norms + mlp)
    window = vision.size("window_size") // tower.merge // tower.patch_size
    return _facts(
        "qwen2_5_vl", config, where, replace(tower, window=window), out, merger_norm=width
    )


def qwen3_vl(config: Config, where: str) -> ModelFacts:
    """LayerNorms, a plain MLP, learned positions, and DeepStack's mergers in the tower."""
    config = _unfolded(config)
    kind = config["model_type"]
    _, vision = section_of(config, "vision_config", f"{kind}_vision", where)
    width, out = vision.size("hidden_size"), vision.size("out_hidden_size")
    inner = vision.size("intermediate_size")
    learned = vision.number("num_position_embeddings") or LEARNED
    norms, mlp = 4 * width, 2 * width * inner + inner + width
    tower = _tower(vision, width, inner, norms + mlp)
    own = tower.parameters + width + learned * width  # the patches' bias
    tower = replace(tower, grid=math.isqrt(learned), parameters=own)
    facts = _facts(kind, config, where, tower, out, merger_norm=2 * width)
    planes = len(vision.values["deepstack_visual_indexes"])
    merger = facts.projector_parameters + 2 * width * (tower.merge**2 - 1)  # its norm is wider
    return replace(
        facts,
        planes=tuple(range(planes)),
        projector_parameters=facts.projector_parameters + planes * merger,
        projector_macs=facts.projector_macs * (1 + planes),
    )


def _unfolded(config: Config) -> Config:
    """With the decoder's values in a part of their own: the hub's files have them at the top.

    Parts are of one class, whatever type they name.
    """
    kind = config["model_type"]
    parts = {"text_config": config.get("text_config"), "vision_config": config.get("vision_config")}
    if parts["text_config"] is None:
        parts["text_config"] = {name: config[name] for name in config if name not in parts}
    typed = {
        key: {**part, "model_type": f"{kind}_{key.removesuffix('_config')}"}
        for key, part in parts.items()
        if isinstance(part, Mapping)
    }
    return {**config, **typed}


def _tower(vision: Section, width: int, inner: int, rest: int) -> VisionFacts:
    """``rest``: a layer's parameters beside its attention."""
    layers, patch = vision.size("depth"), vision.size("patch_size")
    channels = vision.size("in_channels" if "in_channels" in vision.values else "in_chans")
    attention = 4 * width * width + 4 * width
    frames = vision.size("temporal_patch_size")
    return VisionFacts(
        layers=layers,
        layers_run=layers,
        hidden=width,
        heads=vision.size("num_heads"),
        intermediate=inner,
        tokens=None,
        image_size=None,
        patch_size=patch,
        channels=channels,
        has_cls=False,
        parameters=channels * frames * patch**2 * width + layers * (attention + rest),
        merge=vision.size("spatial_merge_size"),
        frames=frames,
    )


def _facts(
    model_type: str, config: Config, where: str, tower: VisionFacts, out: int, *, merger_norm: int
) -> ModelFacts:
    wide = tower.hidden * tower.merge**2
    macs = wide * wide + wide * out
    return ModelFacts(
        model_type=model_type,
        **vars(read_decoder(config, f"{model_type}_text", where)),
        tokens_per_image=None,
        image_token_id=image_token(config, 151655, where),
        vision=tower,
        projector_parameters=macs + wide + out + merger_norm,
        projector_macs=macs,
        mrope=True,
    )
