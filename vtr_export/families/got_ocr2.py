"""GOT-OCR 2: tiles of one size through a SAM, four by four of whose features are one token."""

from dataclasses import replace

from vtr_export.families.decoders import read_decoder
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.section import Config, Section, filled, image_token, section_of
from vtr_export.families.towers import vit

MERGE = 4  # two convolutions, of stride 2 each
PLACES = 9  # of a convolution's kernel


def got_ocr2(config: Config, where: str) -> ModelFacts:
    """A SAM with its neck, two convolutions and a layer that project, and a Qwen 2."""
    config = filled(config)
    decoder = read_decoder(config, "qwen2", where)
    _, vision = section_of(config, "vision_config", "got_ocr2_vision", where)
    tower, width = _sam(vision), vision.number("output_channels") or 256
    side = vision.side("image_size") // vision.side("patch_size")
    if side % MERGE:
        raise vision.error(f"{side} patches a side are not whole fours")
    first, second = PLACES * width * 2 * width, PLACES * 2 * width * decoder.hidden
    return ModelFacts(
        model_type="got_ocr2",
        **vars(decoder),
        tokens_per_image=None,
        image_token_id=image_token(config, 151859, where),
        vision=tower,
        projector_parameters=first + second + (decoder.hidden + 1) * decoder.hidden,
        projector_macs=4 * first + second + decoder.hidden**2,
    )


def _sam(vision: Section) -> VisionFacts:
    """Windows and relative places, which each layer has a table of, rows and columns."""
    biased, relative = vision.flag("qkv_bias", True), vision.flag("use_rel_pos", True)
    tower = vit(vision, rest=1, inner=vision.size("mlp_dim"), biases=4 if biased else 1)
    whole = vision.side("image_size") // vision.side("patch_size")
    everywhere = vision.values.get("global_attn_indexes") or ()
    sides = [whole if n in everywhere else vision.size("window_size") for n in range(tower.layers)]
    places = 2 * sum(2 * side - 1 for side in sides) if relative else 0
    width = vision.number("output_channels") or 256
    neck = (tower.hidden + PLACES * width + 4) * width
    absent = 0 if vision.flag("use_abs_pos", True) else whole**2 * tower.hidden
    more = places * (tower.hidden // tower.heads) + neck - absent
    return replace(tower, parameters=tower.parameters + more, merge=MERGE)
