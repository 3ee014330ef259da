"""Which family a ``config.json`` is of."""

from collections.abc import Callable, Mapping
from typing import Final

from vtr_export.errors import CheckpointError
from vtr_export.families.aya_vision import aya_vision
from vtr_export.families.deepseek_vl import deepseek_vl, janus
from vtr_export.families.facts import ModelFacts
from vtr_export.families.foreign import RAN, foreign, refuse_own_code
from vtr_export.families.gemma import gemma3, paligemma
from vtr_export.families.generic import generic
from vtr_export.families.got_ocr2 import got_ocr2
from vtr_export.families.idefics import idefics
from vtr_export.families.idefics2 import idefics2
from vtr_export.families.idefics3 import idefics3
from vtr_export.families.internvl import internvl
from vtr_export.families.llava import llava
from vtr_export.families.llava_next import llava_next
from vtr_export.families.llava_onevision import llava_onevision
from vtr_export.families.mistral3 import lighton_ocr, mistral3
from vtr_export.families.mllama import mllama
from vtr_export.families.mplug_owl3 import mplug_owl3
from vtr_export.families.qformer import blip_2, instructblip
from vtr_export.families.qwen_vl import qwen2_5_vl, qwen2_vl, qwen3_vl
from vtr_export.families.section import FRESH, Config, architectures
from vtr_export.families.video_llava import video_llava
from vtr_export.families.vipllava import vipllava
from vtr_export.families.vlora import vlora

FAMILIES: Final[Mapping[str, Callable[[Config, str], ModelFacts]]] = {
    "blip-2": blip_2,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "aya_vision": aya_vision,
    "deepseek_vl": deepseek_vl,
    "janus": janus,
    "got_ocr2": got_ocr2,
    "idefics": idefics,
    "idefics2": idefics2,
    "instructblip": instructblip,
    "internvl": internvl,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "lighton_ocr": lighton_ocr,
    "mistral3": mistral3,
    "mllama": mllama,
    "mplug_owl3": mplug_owl3,
    "paligemma": paligemma,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "shieldgemma2": gemma3,
    "smolvlm": idefics3,
    "video_llava": video_llava,
    "vipllava": vipllava,
    "vlora": vlora,
}


def read_facts(config: Config, where: str) -> ModelFacts:
    """Facts of a ``config.json``, with transformers' defaults where it is silent.

    Raises CheckpointError for a model type without a reader, a quantised checkpoint, and values
    that are missing or make no sense; ``where`` names the file. So it does for a model whose
    ``auto_map`` names code of its own, unless ``config`` is what that code made of it.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError("the configuration is not a JSON object", where=where, hint=FRESH)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        _refuse_quantised(part, where)
    refuse_own_code(config, where)
    model_type = config.get("model_type")
    if isinstance(config.get(RAN), Mapping) and isinstance(model_type, str):
        return foreign(config, where)
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type](config, where)
    if isinstance(model_type, str) and model_type in architectures():
        return generic(config, where)
    raise CheckpointError(
        f"model_type {model_type!r} is not supported",
        where=where,
        hint=f"supported: {', '.join(sorted(FAMILIES))}",
    )


def _refuse_quantised(part: object, where: str) -> None:
    if not isinstance(part, Mapping) or part.get("quantization_config") is None:
        return
    quantization = part["quantization_config"]
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise CheckpointError(
        f"the checkpoint is quantised ({method or 'method not named'}); its weights are not plain",
        where=where,
        hint="start from the unquantised checkpoint (without quantization_config)",
    )
