"""What OpenGVLab's code does with images and text, as the files that transformers reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vtr_export.layouts.internvl_chat import top
from vtr_export.layouts.internvl_prompt import template
from vtr_export.layouts.tokens import END, IMAGE, START, read_object

Config = Mapping[str, Any]
IMAGENET: Final = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BICUBIC: Final = 3  # Pillow's number
KNOWN: Final = ("Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizer")  # and their Fast ones


def convert(own: Config, config: Config, folder: Path) -> dict[str, str]:
    """Texts by file name: configuration, processor, tokenizer and chat template."""
    made = {
        "config.json": dict(config),
        "preprocessor_config.json": _images(top(own), config),
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": config["image_seq_length"],
        },
    }
    if tokenizer := read_object(folder / "tokenizer_config.json"):
        made["tokenizer_config.json"] = _tokenizer(tokenizer)
    texts = {name: json.dumps(data, indent=2, ensure_ascii=False) for name, data in made.items()}
    if (prompt := template(own, folder)) is not None:
        texts["chat_template.jinja"] = prompt
    return texts


def _images(full: Config, config: Config) -> dict[str, Any]:
    side, dynamic = config["vision_config"]["image_size"], full["dynamic_image_size"]
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": side, "width": side},
        "resample": BICUBIC,
        "crop_to_patches": dynamic,
        "min_patches": full["min_dynamic_patch"] if dynamic else 1,
        "max_patches": full["max_dynamic_patch"] if dynamic else 1,
        "ps_version": full["ps_version"],  # transformers leaves these two alone
        "pad2square": full["pad2square"] and not dynamic,  # a tile is square
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        **IMAGENET,
    }


def _tokenizer(own: Config) -> dict[str, Any]:
    """Without code of its own, and with the tokens around an image by transformers' names."""
    kind = str(own.get("tokenizer_class", "")).removesuffix("Fast")
    named = own.get("extra_special_tokens")
    return {
        **{name: value for name, value in own.items() if name != "auto_map"},
        "tokenizer_class": kind if kind in KNOWN[:-1] else "PreTrainedTokenizerFast",
        "extra_special_tokens": {
            **(named if isinstance(named, Mapping) else {}),
            "start_image_token": START,
            "end_image_token": END,
            "context_image_token": IMAGE,
            "video_token": END,  # there is none: one that no prompt holds
        },
    }
