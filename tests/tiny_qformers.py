"""Tiny random BLIP-2 and InstructBLIP models, with their processors."""

from pathlib import Path
from typing import Any

import tiny_models
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

IMAGE, PATCH, QUERIES = 28, 7, 12
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
QFORMER = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "encoder_hidden_size": VISION["hidden_size"],
}
OPT = {
    "model_type": "opt",
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": tiny_models.PAD,
    "bos_token_id": tiny_models.BOS,
    "eos_token_id": tiny_models.EOS,
}


def image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})


def tokenizer() -> PreTrainedTokenizerFast:
    """It does not call its image token so: the processors then take it for their own kind."""
    named = tiny_models.tiny_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=named.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def config(**others: Any) -> Blip2Config:
    return Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=OPT,
        num_query_tokens=QUERIES,
        image_token_index=tiny_models.IMAGE,
        **others,
    )


def blip_2(folder: Path, seed: int = 0) -> PreTrainedModel:
    model = Blip2ForConditionalGeneration(config()).eval()
    tiny_models.randomize(model, seed)
    model.save_pretrained(folder)
    Blip2Processor(image_processor(), tokenizer(), num_query_tokens=QUERIES).save_pretrained(folder)
    return model


LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": tiny_models.PAD,
    "bos_token_id": tiny_models.BOS,
    "eos_token_id": tiny_models.EOS,
}
READ = 120  # tokens of a question that the Q-Former may read


def reading_config(**others: Any) -> InstructBlipConfig:
    words = {"vocab_size": len(vocabulary()), "max_position_embeddings": READ}
    return InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER | words,
        text_config=LLAMA,
        num_query_tokens=QUERIES,
        image_token_index=tiny_models.IMAGE,
        **others,
    )


def vocabulary() -> list[str]:
    """Of BERT's tokenizer: whole words, letters for the rest."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*tiny_models.WORDS_LINE.split(), *letters, *(f"##{letter}" for letter in letters)]
    return [*special, *dict.fromkeys(words)]


def instructblip(folder: Path, seed: int = 0) -> PreTrainedModel:
    """Its decoder is LLaMA, as Vicuna is."""
    model = InstructBlipForConditionalGeneration(reading_config()).eval()
    tiny_models.randomize(model, seed)
    model.save_pretrained(folder)
    reader = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary())})
    processor = InstructBlipProcessor(image_processor(), tokenizer(), reader, QUERIES)
    processor.save_pretrained(folder)
    return model
