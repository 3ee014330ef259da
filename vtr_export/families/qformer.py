"""BLIP-2 and what came of it: a Q-Former makes a few tokens of an image, whatever its size."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vtr_export.errors import CheckpointError
from vtr_export.families.decoders import ENCODER_DECODERS, DecoderFacts, read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.opt import read_opt
from vtr_export.families.section import Config, Section, defaults, filled, section_of
from vtr_export.families.towers import vit


@dataclass(frozen=True)
class _Parts:
    """Multiply-adds of the Q-Former: of a query, and of a patch; and all that it holds."""

    query: int
    patch: int
    parameters: int


def blip_2(config: Config, where: str) -> ModelFacts:
    """A prompt has one image: its tokens stand before the text."""
    return _facts(config, where, reads=False)


def instructblip(config: Config, where: str) -> ModelFacts:
    """As BLIP-2, but the Q-Former reads the question, too."""
    return _facts(config, where, reads=True)


def _facts(config: Config, where: str, *, reads: bool) -> ModelFacts:
    config = filled(config)
    kind, top = config["model_type"], Section(config, "", where)
    decoder, vision = _decoder(config, where), _tower(config, where)
    queries = top.size("num_query_tokens")
    former = _former(config, vision.hidden, where, reads=reads)
    width = _qformer(config, where).size("hidden_size")
    projection = width * decoder.hidden
    assert vision.tokens is not None, "images have one size"
    return ModelFacts(
        model_type=kind,
        **vars(decoder),
        tokens_per_image=queries,
        image_token_id=_image_token(top),
        vision=replace(vision, latents=queries),
        projector_parameters=former.parameters + queries * width + projection + decoder.hidden,
        projector_macs=former.query + projection + former.patch * vision.tokens // queries,
        reads=_qformer(config, where).size("max_position_embeddings") if reads else 0,
    )


def _decoder(config: Config, where: str) -> DecoderFacts:
    """OPT or LLaMA; T5 is refused, for its layers read the image through cross-attention."""
    fallback = defaults()[config["model_type"]]["sub_configs"]["text_config"]
    given = config.get("text_config")
    kind = given.get("model_type", fallback) if isinstance(given, Mapping) else fallback
    if kind in ENCODER_DECODERS:
        raise CheckpointError(
            f"{config['model_type']} with {kind} cannot be pruned: it is an encoder-decoder",
            where=where,
            hint="a schedule needs a decoder whose every layer attends to the prompt's image "
            "tokens: export the checkpoint with OPT or Vicuna",
        )
    return read_opt(config, where) if kind == "opt" else read_decoder(config, kind, where)


def _image_token(top: Section) -> int:
    value = top.values.get("image_token_index")
    if type(value) is not int or value < 0:
        raise top.error(
            f"image_token_index is {value!r}: the file names no token for an image's places",
            "take the model's current revision: the token was added to it later",
        )
    return value


def _tower(config: Config, where: str) -> VisionFacts:
    """EVA's ViT: a class embedding, learned positions, fused QKV, a last norm."""
    kind = defaults()[config["model_type"]]["sub_configs"]["vision_config"]
    _, vision = section_of(config, "vision_config", kind, where)
    return vit(vision, rest=4, has_cls=True, biases=4 if vision.flag("qkv_bias", True) else 1)


def _qformer(config: Config, where: str) -> Section:
    kind = defaults()[config["model_type"]]["sub_configs"]["qformer_config"]
    return section_of(config, "qformer_config", kind, where)[1]


def _former(config: Config, encoder: int, where: str, *, reads: bool) -> _Parts:
    """BERT's layers; every so many a cross-attention, and an MLP apart for text that is read."""
    own = _qformer(config, where)
    width, intermediate = own.size("hidden_size"), own.size("intermediate_size")
    layers = own.size("num_hidden_layers")
    crossing = -(-layers // own.size("cross_attention_frequency"))
    mlp, mlp_biases = 2 * width * intermediate, intermediate + 3 * width
    query = layers * (4 * width**2 + mlp) + crossing * 2 * width**2
    patch = crossing * 2 * encoder * width
    biases = (layers + crossing) * 6 * width + layers * mlp_biases + 2 * width
    text = 0
    if reads:
        words = own.size("vocab_size") + own.size("max_position_embeddings")
        text = words * width + layers * (mlp + mlp_biases)
    return _Parts(query, patch, query + patch + biases + text)
