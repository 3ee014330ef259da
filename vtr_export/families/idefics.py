"""Idefics (Flamingo): LLaMA's layers, and gated blocks between them that attend to images.

Each block counts as a layer: it has attention, an MLP, and keys of its own.
"""

from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, Section, filled, image_token, is_tied, section_of


def idefics(config: Config, where: str) -> ModelFacts:
    """An image has one token in the prompt, its place; its keys are no tokens."""
    config = filled(config)
    top = Section(config, "", where)
    hidden, heads = top.size("hidden_size"), top.size("num_attention_heads")
    if hidden % heads:
        raise top.error(f"hidden_size {hidden} is no multiple of {heads} heads")
    crosses = _crosses(top)
    tower, projector, macs = _tower(config, where)
    assert tower.tokens is not None, "of one size"
    vocab = top.size("vocab_size") + _additional(top)
    dtype = config.get("dtype", config.get("torch_dtype"))
    block = 2 * (tower.hidden - hidden) * hidden + _gates(top, hidden, hidden // heads)
    return ModelFacts(
        model_type="idefics",
        layers=top.size("num_hidden_layers") + len(crosses),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=top.size("intermediate_size"),
        gated=True,
        vocab=vocab,
        context=top.size("max_position_embeddings"),
        tied=is_tied(config, top),
        dtype=dtype if isinstance(dtype, str) else None,
        tokens_per_image=tower.latents or tower.tokens,
        image_token_id=image_token(config, vocab - 1, where),  # no field says it
        vision=tower,
        projector_parameters=projector,
        projector_macs=macs,
        crosses=crosses,
        cross_width=tower.hidden,
        cross_parameters=len(crosses) * block,
        sight="latest",
    )


def _crosses(top: Section) -> tuple[int, ...]:
    """A block stands before every so many layers."""
    layers, interval = top.size("num_hidden_layers"), top.size("cross_layer_interval")
    if layers % interval:
        raise top.error(f"cross_layer_interval {interval} does not divide {layers} layers")
    return tuple(range(0, layers + layers // interval, interval + 1))


def _additional(top: Section) -> int:
    """Words that have tables of their own, such as an image's."""
    return top.size("additional_vocab_size") if top.values.get("additional_vocab_size") else 0


def _gates(top: Section, hidden: int, head_dim: int) -> int:
    """What a block has beside projections and two norms."""
    kind = top.values.get("alpha_type", "float")
    if kind not in ("float", "vector"):
        raise top.error(f"alpha_type is {kind!r}, not float or vector")
    norms = 2 * head_dim if top.flag("qk_layer_norms", False) else 0
    return norms + 2 * (hidden if kind == "vector" else 1)


def _tower(config: Config, where: str) -> tuple[VisionFacts, int, int]:
    """The encoder, and a resampler's parameters and multiply-adds per latent."""
    _, vision = section_of(config, "vision_config", "idefics_vision", where)
    width, inner = _width(vision), vision.size("intermediate_size")
    image, patch = vision.side("image_size"), vision.side("patch_size")
    layers, channels = vision.size("num_hidden_layers"), vision.size("num_channels")
    tokens = (image // patch) ** 2 + 1
    layer = 4 * width**2 + 2 * width * inner + inner + 9 * width
    resampled = Section(config, "", where).flag("use_resampler", False)
    latents, held, macs = _perceiver(config, where, width, tokens) if resampled else (None, 0, 0)
    tower = VisionFacts(
        layers=layers,
        layers_run=layers,
        hidden=width,
        heads=vision.size("num_attention_heads"),
        intermediate=inner,
        tokens=tokens,
        image_size=image,
        patch_size=patch,
        channels=channels,
        has_cls=True,
        parameters=(channels * patch**2 + 1 + tokens + 2) * width + layers * layer,
        latents=latents,
    )
    return tower, held, macs


def _width(vision: Section) -> int:
    """Older files say ``embed_dim``, newer ones may say ``hidden_size``."""
    return vision.number("hidden_size") or vision.size("embed_dim")


def _perceiver(config: Config, where: str, width: int, tokens: int) -> tuple[int, int, int]:
    """Latents, parameters, and multiply-adds per latent."""
    _, own = section_of(config, "perceiver_config", "idefics_perciever", where)
    latents, depth = own.size("resampler_n_latents"), own.size("resampler_depth")
    head = own.size("resampler_head_dim")
    inner = own.size("resampler_n_heads") * head
    norms = 4 * head if own.flag("qk_layer_norms_perceiver", False) else 0
    block = 4 * width * inner + 8 * width**2 + 6 * width + norms
    keys = tokens + latents
    macs = 2 * latents * width * inner + 2 * keys * (width + latents) * inner
    macs += 8 * latents * width**2
    return latents, latents * width + depth * block + 2 * width, depth * macs // latents
