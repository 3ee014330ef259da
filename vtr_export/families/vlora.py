"""VLoRA: CLIP tower, five generators of low-rank weights, LLaMA that an image changes."""

from typing import Any, Final

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts
from vtr_export.families.section import Config, Section
from vtr_export.families.towers import read_tower

TYPES: Final = 5  # q, k, v, o and the MLP
DEFAULTS: Final[dict[str, Any]] = {  # see models/vlora.py
    "vlora_dim": 512,
    "vlora_depth": 8,
    "vlora_heads": 16,
    "vlora_mlp_ratio": 4,
    "vlora_rank": 64,
    "skip_layers": 4,
}


def vlora(config: Config, where: str) -> ModelFacts:
    """An image has no token in the prompt, so that no schedule can cut any."""
    own = Section({**DEFAULTS, **config}, "", where)
    decoder, (tower, _) = read_decoder(config, "llama", where), read_tower(config, where)
    if not tower.has_cls or tower.tokens is None:
        raise own.error("vision_config is no CLIP tower", "VLoRA's images are seen by CLIP")
    dim, rank, skip = own.size("vlora_dim"), own.size("vlora_rank"), own.size("skip_layers")
    if dim % own.size("vlora_heads") or skip > decoder.layers:
        raise own.error(f"vlora_dim {dim} or skip_layers {skip} fits no model")
    if decoder.tied:
        raise own.error("tie_word_embeddings is true: VLoRA has a head of its own")
    groups = decoder.layers // skip
    wide, q = own.size("vlora_mlp_ratio") * dim, decoder.heads * decoder.head_dim
    kv, head = decoder.kv_heads * decoder.head_dim, decoder.hidden * rank
    block = 8 * (dim + 1) * dim + 2 * wide * dim + wide + dim + 6 * dim
    generator = groups * dim + own.size("vlora_depth") * block + 2 * dim + (dim + 1) * head
    patches = (tower.hidden + 1) * dim + (tower.tokens - 1) * dim
    added = groups * rank * (q + 2 * kv + 2 * decoder.hidden)
    return ModelFacts(
        model_type="vlora",
        **vars(decoder),
        tokens_per_image=0,
        image_token_id=None,
        vision=tower,
        projector_parameters=patches + TYPES * generator + added,
        projector_macs=0,
        features="weights",
        feature_shape=(groups, TYPES, decoder.hidden, rank),
    )
