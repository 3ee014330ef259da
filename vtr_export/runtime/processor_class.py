"""Which of transformers' processors a checkpoint was made for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vtr_export.runtime.json_files import read_json

FILES: Final = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
OF_MODELS: Final[Mapping[str, str]] = {  # where no file names one, as transformers chooses
    "blip-2": "Blip2Processor",
    "gemma3": "Gemma3Processor",
    "idefics3": "Idefics3Processor",
    "aya_vision": "AyaVisionProcessor",
    "deepseek_vl": "DeepseekVLProcessor",
    "got_ocr2": "GotOcr2Processor",
    "idefics": "IdeficsProcessor",
    "idefics2": "Idefics2Processor",
    "mllama": "MllamaProcessor",
    "instructblip": "InstructBlipProcessor",
    "janus": "JanusProcessor",
    "lighton_ocr": "LightOnOcrProcessor",
    "internvl": "InternVLProcessor",
    "mistral3": "PixtralProcessor",
    "paligemma": "PaliGemmaProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "smolvlm": "SmolVLMProcessor",
    "vlora": "VLoRAProcessor",
    "mplug_owl3": "mPLUGOwl3Processor",
}


def processor_class(folder: Path) -> str:
    """The class's name; empty where neither a file nor the model's type says."""
    for name in FILES:
        if isinstance(found := read_json(folder / name).get("processor_class"), str):
            return found
    return OF_MODELS.get(str(read_json(folder / "config.json").get("model_type")), "")
