"""Tiny random InternVL models in transformers' format, with their processor."""

from pathlib import Path
from typing import Any, Literal

import tiny_models
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from vtr_export.verify.processors import without_videos

IMAGE, PATCH, MERGE = 28, 7, 2
TOKENS = (IMAGE // PATCH // MERGE) ** 2  # of a tile
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", *NAMED.values())
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} :"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
TEXTS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def tiny_internvl(
    seed: int = 0,
    *,
    text: Literal["qwen2", "qwen3", "llama"] = "qwen2",
    tied: bool = False,
    layers: int = 4,
    vocab: int = 64,
    **vision: Any,
) -> InternVLForConditionalGeneration:
    """Four tokens a tile; ``vision`` goes to the tower's configuration."""
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=5,
                num_attention_heads=2,
                image_size=[IMAGE, IMAGE],
                patch_size=[PATCH, PATCH],
                **vision,
            ),
            text_config=TEXTS[text](
                vocab_size=vocab,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=1024,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=tied,
            ),
            image_token_id=SPECIAL.index("<IMG_CONTEXT>"),
            image_seq_length=TOKENS,
            downsample_ratio=1 / MERGE,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    tiny_models.randomize(model, seed)
    model.generation_config.eos_token_id = 2
    return model.eval()


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Nothing in front."""
    raw = tiny_models.whole_words(SPECIAL, vocab)
    return tiny_models.tokenizer_of(raw, extra_special_tokens=NAMED)


def tiny_processor(model: PreTrainedModel) -> InternVLProcessor:
    """The processor that fits ``model``; its file says nothing of tiles, as those on the hub."""
    return without_videos(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": IMAGE, "width": IMAGE}, max_patches=6
        ),
        tokenizer=tiny_tokenizer(model.config.text_config.vocab_size),
        image_seq_length=TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def internvl(folder: Path, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A checkpoint folder as transformers saves it."""
    model = tiny_internvl(seed, **options)
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    return model
