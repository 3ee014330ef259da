"""A tiny random Mllama with its processor."""

from pathlib import Path

import tiny_models
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB, TILE, PATCH = 64, 20, 5
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|python_tag|>")
IMAGE = "<|image|>"  # its id is the first behind the vocabulary, as it is in Llama 3.2 Vision
CROSSES = [1, 2, 3, 5]
CHAT_TEMPLATE = "<s>" + tiny_models.CHAT_TEMPLATE.replace("<image>", IMAGE)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words."""
    words = [*SPECIAL, *tiny_models.WORDS_LINE.split()]
    words += [f"word{index}" for index in range(len(words), VOCAB)]
    words.append(IMAGE)
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL, IMAGE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[SPECIAL[4], IMAGE],
        padding_side="left",
    )


def tiny_config() -> MllamaConfig:
    return MllamaConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": CROSSES,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_global_layers": 2,
            "attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 48,
        },
        image_token_index=VOCAB,
    )


def mllama(folder: Path, seed: int = 0) -> PreTrainedModel:
    model = MllamaForConditionalGeneration(tiny_config()).eval()
    tiny_models.randomize(model, seed)
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if name.endswith("_gate"):
                gate.fill_(0.7)
    model.save_pretrained(folder)
    MllamaProcessor(
        image_processor=MllamaImageProcessorPil(size={"height": TILE, "width": TILE}),
        tokenizer=tiny_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model
