"""The untrained model, its tokenizer and its processor, as transformers knows them."""

from pathlib import Path

import torch
from questions import corpus
from scenes import IMAGE, PATCH
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TOKENS = (IMAGE // PATCH) ** 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE_TOKEN = range(5)
WIDTH, HEADS, KEY_HEADS, DECODER_LAYERS = 128, 4, 2, 8
TOWER_LAYERS = 5  # like LLaVA-1.5 the features are those before the last layer
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def config() -> LlavaConfig:
    """LLaVA-1.5 in small: 144 vision tokens, eight grouped-query layers."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def make_model(seed: int) -> LlavaForConditionalGeneration:
    """A model whose matrices keep the scale of what they multiply, whatever the width."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config())
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = 0.02 if "embed" in name and "patch" not in name else parameter[0].numel() ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            std /= (2 * DECODER_LAYERS) ** 0.5
        nn.init.normal_(parameter, std=std)
    with torch.no_grad():
        places = model.model.vision_tower.embeddings.position_embedding.weight
        places[1:] = waves(IMAGE // PATCH, WIDTH)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=4, do_sample=False
    )
    return model


def waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, ``[side * side, width]``: near patches look alike."""
    rates = torch.logspace(0.3, -1.3, width // 4)
    angles = torch.arange(side)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    return torch.cat([rows, columns], 1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower case; ``<s>`` is put in front."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=64, special_tokens=list(SPECIAL))
    words.train_from_iterator([*corpus(), "user: assistant: system:"], trainer)
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_processor() -> LlavaProcessor:
    """CLIP's ordinary preprocessing at 96 pixels, and the chat template of LLaVA-1.5."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
    )
    return LlavaProcessor(
        images,
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the checkpoint folder; the weights appear whole or not at all."""
    beside = folder.with_name(f"{folder.name}.tmp-save")
    model.save_pretrained(beside)
    processor = make_processor()
    processor.save_pretrained(beside)
    processor.image_processor.save_pretrained(beside)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(beside.iterdir()):
        file.replace(folder / file.name)
    beside.rmdir()
