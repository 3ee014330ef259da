"""Mllama (Llama 3.2 Vision): LLaMA with layers that attend to the tiles of images instead."""

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, Section, filled, image_token, section_of

MORE_WORDS = 8  # rows of the embedding table behind the vocabulary: of the image's token
TILES = 4


def mllama(config: Config, where: str) -> ModelFacts:
    """How many keys an image becomes depends on its tiles."""
    config = filled(config)
    decoder = read_decoder(config, "mllama_text_model", where)
    _, text = section_of(config, "text_config", "mllama_text_model", where)
    crosses = _crosses(text, decoder.layers)
    tower, width = _tower(config, where)
    return ModelFacts(
        model_type="mllama",
        **vars(decoder),
        tokens_per_image=None,
        image_token_id=image_token(config, 128256, where),
        vision=tower,
        projector_parameters=(width + 1) * decoder.hidden,
        projector_macs=width * decoder.hidden,
        crosses=crosses,
        cross_parameters=len(crosses) * (2 * decoder.head_dim + 2),  # norms and gates
        more_embeddings=MORE_WORDS,
    )


def _crosses(text: Section, layers: int) -> tuple[int, ...]:
    """Ascending; all of them and none are no decoder that cuts could be told of."""
    given = text.values.get("cross_attention_layers")
    given = text.values["derived"]["cross_attention_layers"] if given is None else given
    if not isinstance(given, list) or any(type(layer) is not int for layer in given):
        raise text.error(f"cross_attention_layers is {given!r}, not a list of layers")
    found = tuple(sorted(layer for layer in set(given) if 0 <= layer < layers))
    if not 0 < len(found) < layers:
        raise text.error(f"cross_attention_layers {given!r} are none or all of {layers} layers")
    return found


def _tower(config: Config, where: str) -> tuple[VisionFacts, int]:
    """Layers on all tiles together, gated ones behind them; and how wide features are."""
    _, vision = section_of(config, "vision_config", "mllama_vision_model", where)
    width, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    image, patch = vision.side("image_size"), vision.side("patch_size")
    layers, last = vision.size("num_hidden_layers"), vision.size("num_global_layers")
    tiles = vision.number("max_num_tiles") or TILES
    shapes = vision.values.get("supported_aspect_ratios")
    grids = 1 + (len(shapes) if shapes else _grids(tiles))
    tokens, channels = (image // patch) ** 2 + 1, vision.size("num_channels")
    layer = 4 * width**2 + 2 * width * inner + inner + 5 * width
    places = tokens * width * (1 + grids * tiles) + 1 + 2 * (grids * tiles * width + 1)
    tower = VisionFacts(
        layers=layers + last,
        layers_run=layers + last,
        hidden=width,
        heads=vision.number("attention_heads") or vision.size("num_attention_heads"),
        intermediate=inner,
        tokens=tiles * -(-tokens // 8) * 8,
        image_size=image,
        patch_size=patch,
        channels=channels,
        has_cls=True,
        parameters=channels * patch**2 * width
        + 5 * width
        + places
        + (layers + last) * layer
        + 2 * last,
        tiles=tiles,
    )
    return tower, vision.number("vision_output_dim") or 7680


def _grids(tiles: int) -> int:
    """Shapes of at most so many tiles."""
    return sum(1 for rows in range(1, tiles + 1) for _ in range(tiles // rows))
