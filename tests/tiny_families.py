"""A tiny random checkpoint folder of every family, with its own processor: name → how to save it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny_aya
import tiny_deepseek
import tiny_gemma
import tiny_got
import tiny_idefics
import tiny_idefics2
import tiny_idefics3
import tiny_internvl
import tiny_llavas
import tiny_mistral
import tiny_mllama
import tiny_models
import tiny_qformers
import tiny_qwen
from transformers import PreTrainedModel

from vtr_export.families import read_facts

Save = Callable[[Path, int], PreTrainedModel]  # folder, seed → the model that was saved there


def llava(folder: Path, seed: int = 0) -> PreTrainedModel:
    model = tiny_models.tiny_llava(seed=seed)
    tiny_models.save_checkpoint(model, folder)
    return model


TINY: Mapping[str, Save] = {
    "blip-2": tiny_qformers.blip_2,
    "gemma3": tiny_gemma.gemma3,
    "idefics3": tiny_idefics3.idefics3,
    "idefics": tiny_idefics.idefics,
    "idefics2": tiny_idefics2.idefics2,
    "instructblip": tiny_qformers.instructblip,
    "got_ocr2": tiny_got.got_ocr2,
    "internvl": tiny_internvl.internvl,
    "llava": llava,
    "llava/pixtral": tiny_mistral.pixtral,
    "aya_vision": tiny_aya.aya_vision,
    "deepseek_vl": tiny_deepseek.deepseek_vl,
    "janus": tiny_deepseek.janus,
    "lighton_ocr": tiny_mistral.lighton_ocr,
    "mistral3": tiny_mistral.mistral3,
    "mllama": tiny_mllama.mllama,
    "llava_next": tiny_llavas.llava_next,
    "llava_onevision": tiny_llavas.llava_onevision,
    "paligemma": tiny_gemma.paligemma,
    "paligemma2": tiny_gemma.paligemma2,
    "qwen2_5_vl": tiny_qwen.qwen2_5_vl,
    "qwen2_vl": tiny_qwen.qwen2_vl,
    "qwen3_vl": tiny_qwen.qwen3_vl,
    "qwen3_vl_moe": tiny_qwen.qwen3_vl_moe,
    "video_llava": tiny_llavas.video_llava,
    "vipllava": tiny_llavas.vipllava,
    "smolvlm": tiny_idefics3.smolvlm,
}


def stages(folder: Path) -> dict[str, Any]:
    """A schedule of three cuts for a checkpoint: before layers 1, 2 and 3, or behind cross layers.

    All text asks, or the last row where images are keys of cross-attention.
    """
    facts = read_facts(json.loads((folder / "config.json").read_text()), "config.json")
    firsts = [layer + 1 for layer in facts.crosses[:3]] or [1, 2, 3]
    query = "last" if facts.crosses else "text"
    return {
        "version": 1,
        "prefill": {
            "score": {"from": "previous", "query": query, "heads": "mean"},
            "stages": [
                {"before_layer": layer, "keep": keep}
                for layer, keep in zip(firsts, ("75%", "50%", "25%"), strict=True)
            ],
        },
    }
