"""Idefics2: images keep their shape; a Perceiver makes a few latents of each or its quarters."""

from dataclasses import replace

from vtr_export.families.decoders import DecoderFacts, read_decoder
from vtr_export.families.facts import ModelFacts
from vtr_export.families.section import Config, Section, filled, image_token, section_of
from vtr_export.families.towers import vit

WIDER = 4  # times its width: a resampler layer's MLP


def idefics2(config: Config, where: str) -> ModelFacts:
    """Tokens depend on whether images are split, which their processor's file says."""
    config = filled(config)
    decoder = read_decoder(config, "mistral", where)
    _, vision = section_of(config, "vision_config", "idefics2_vision", where)
    _, resampler = section_of(config, "perceiver_config", "idefics2_perceiver", where)
    latents = resampler.number("resampler_n_latents") or 64
    tower = replace(vit(vision, rest=3), latents=latents)  # SigLIP with a last norm
    assert tower.tokens is not None, "of the largest image"
    patch, latent, fixed = _projector(tower.hidden, decoder, resampler)
    return ModelFacts(
        model_type="idefics2",
        **vars(decoder),
        tokens_per_image=None,
        image_token_id=image_token(config, 32001, where),
        vision=tower,
        projector_parameters=patch + latent + fixed + (latents + 1) * decoder.hidden,
        projector_macs=latent + patch * tower.tokens // latents,
    )


def _projector(width: int, decoder: DecoderFacts, resampler: Section) -> tuple[int, int, int]:
    """Weights that a patch passes, those that a latent passes, and the norms'."""
    out, depth = decoder.hidden, resampler.size("resampler_depth")
    head = resampler.size("resampler_head_dim")
    q = head * resampler.size("resampler_n_heads")
    kv = head * resampler.size("num_key_value_heads")
    patch = (2 * width + out) * decoder.intermediate + depth * 2 * out * kv
    latent = depth * (2 * out * q + 3 * WIDER * out**2)
    return patch, latent, depth * 3 * out
