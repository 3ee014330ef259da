"""Facts from configurations, against transformers' own defaults and parameter counts."""

from typing import Any

import pytest

from vtr_export.errors import CheckpointError
from vtr_export.families import FAMILIES, read_facts

LLAVA_7B: dict[str, Any] = {  # llava-hf/llava-1.5-7b-hf, config.json as published
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "text_config": {
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def tiny(**changes: Any) -> dict[str, Any]:
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 64,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 9,
        "patch_size": 4,
    }
    text |= changes.pop("text", {})
    vision |= changes.pop("vision", {})
    return {"model_type": "llava", "text_config": text, "vision_config": vision, **changes}


def test_the_published_llava_7b() -> None:
    facts = read_facts(LLAVA_7B, "config.json")
    assert (facts.layers, facts.hidden, facts.heads, facts.kv_heads, facts.head_dim) == (
        32,
        4096,
        32,
        32,
        128,
    )
    assert (facts.intermediate, facts.vocab, facts.context, facts.tied) == (
        11008,
        32064,
        4096,
        False,
    )
    assert (facts.tokens_per_image, facts.image_token_id, facts.dtype) == (576, 32000, "float16")
    assert facts.vision is not None
    assert (facts.vision.layers, facts.vision.layers_run, facts.vision.tokens) == (24, 23, 577)


def test_a_llava_that_says_nothing_is_transformers_default() -> None:
    transformers = pytest.importorskip("transformers", reason="its config is the oracle")
    facts, config = read_facts({"model_type": "llava"}, "x"), transformers.LlavaConfig()
    text, vision = config.text_config, config.vision_config
    assert (facts.layers, facts.hidden, facts.intermediate) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
    )
    assert (facts.kv_heads, facts.vocab, facts.context) == (
        text.num_key_value_heads,
        text.vocab_size,
        text.max_position_embeddings,
    )
    assert facts.vision is not None
    assert (facts.vision.layers, facts.vision.hidden, facts.vision.image_size) == (
        vision.num_hidden_layers,
        vision.hidden_size,
        vision.image_size,
    )
    assert facts.tokens_per_image == config.image_seq_length


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_text_defaults_are_those_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="its config is the oracle")
    config = transformers.AutoConfig.for_model(kind)
    facts = read_facts(
        {"model_type": "llava", "text_config": {"model_type": kind, "sliding_window": None}}, "x"
    )
    assert (facts.layers, facts.hidden, facts.intermediate, facts.heads) == (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
    )
    assert (facts.kv_heads, facts.vocab, facts.context) == (
        config.num_key_value_heads,
        config.vocab_size,
        config.max_position_embeddings,
    )


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_tower_defaults_are_those_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="its config is the oracle")
    config = transformers.AutoConfig.for_model(kind)
    vision = read_facts({"model_type": "llava", "vision_config": {"model_type": kind}}, "x").vision
    assert vision is not None
    expected = (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.image_size,
        config.patch_size,
    )
    assert (
        vision.layers,
        vision.hidden,
        vision.intermediate,
        vision.heads,
        vision.image_size,
        vision.patch_size,
    ) == expected


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize(
    "text",
    [
        {},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
@pytest.mark.parametrize("feature", [-2, [-2, 1], -1])
def test_counts_equal_those_of_a_real_tiny_model(
    strategy: str, tower: str, text: dict[str, Any], feature: Any
) -> None:
    torch = pytest.importorskip("torch", reason="the oracle is a model of it")
    transformers = pytest.importorskip("transformers", reason="the oracle is its model")
    config = tiny(
        text=text,
        vision={"model_type": tower},
        vision_feature_select_strategy=strategy,
        vision_feature_layer=feature,
    )
    facts = read_facts(config, "x")
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig.from_dict(config)
        )
    assert (
        sum(p.numel() for p in model.model.multi_modal_projector.parameters())
        == facts.projector_parameters
    )
    assert facts.vision is not None
    unused = (
        "post_layernorm",
        "head.",
        f"layers.{facts.vision.layers_run}.",
    )  # -2 leaves the last layer out
    held = [
        p
        for name, p in model.model.vision_tower.named_parameters()
        if not any(u in name for u in unused)
    ]
    assert sum(p.numel() for p in held) == facts.vision.parameters
    layer = model.model.language_model.layers[0]
    assert (
        sum(p.numel() for name, p in layer.named_parameters() if name.endswith("bias"))
        == facts.layer_biases
    )
    assert facts.tied == bool(text.get("tie_word_embeddings"))
    rows = 4 + (tower == "clip_vision_model") - (strategy == "default")
    assert facts.tokens_per_image == rows


@pytest.mark.parametrize("decoder", [{}, {"tie_word_embeddings": True}], ids=["silent", "tied"])
@pytest.mark.parametrize("whole", [None, True, False])
@pytest.mark.parametrize(
    "kind", ["llava", "vipllava", "qwen2_vl", "idefics2", "internvl", "mistral3"]
)
def test_a_head_is_tied_where_transformers_ties_it(
    kind: str, whole: bool | None, decoder: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch", reason="the oracle is a model of it")
    transformers = pytest.importorskip("transformers", reason="the oracle is its model")
    text = {
        **tiny()["text_config"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]},
    }
    config = {"model_type": kind, "text_config": {**text, **decoder}, **FITTING.get(kind, {})}
    if whole is not None:
        config["tie_word_embeddings"] = whole
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            transformers.CONFIG_MAPPING[kind].from_dict(config)
        )
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert read_facts(config, "x").tied == tied


def test_an_older_file_says_that_a_decoder_has_its_own_head() -> None:
    config = {"model_type": "internvl", "text_config": {"tie_word_embeddings": False}}
    assert not read_facts(config, "x").tied


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "supported: "),
        ({}, "model_type None"),
        ({"model_type": ["llava"]}, "is not supported"),
        ([], "not a JSON object"),
        (tiny(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
        (tiny(text={"quantization_config": {"load_in_4bit": True}}), "quantised"),
        (tiny(text={"num_hidden_layers": "3"}), "text_config.num_hidden_layers is '3'"),
        (tiny(text={"num_hidden_layers": True}), "not a positive integer"),
        (tiny(text={"num_attention_heads": 3}), "cannot share"),
        (tiny(text={"model_type": "gpt2"}), "text_config.model_type 'gpt2'"),
        (tiny(text={"model_type": "gemma", "use_bidirectional_attention": True}), "is true"),
        (tiny(text={"model_type": ["llama"]}), "is not supported"),
        (tiny(vision={"model_type": "swin"}), "vision_config.model_type 'swin'"),
        (tiny(vision_feature_layer=9), "does not fit a tower of 3 layers"),
        (tiny(vision_feature_select_strategy="cls"), "neither"),
        (tiny(vision={"image_size": [9, 12]}), "image_size"),
        (tiny(tie_word_embeddings="no"), "not true or false"),
        ({"model_type": "llava", "text_config": 3}, "not an object"),
    ],
)
def test_refusals(config: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_facts(config, "somewhere/config.json")
    assert said in str(caught.value)
    assert "somewhere/config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, 32),
        ({"model_type": "mistral", "sliding_window": 32, "layer_types": ["full_attention"]}, None),
        ({"model_type": "mistral", "sliding_window": 4096}, None),
        ({"model_type": "qwen2", "sliding_window": 32}, None),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True}, 32),
        ({"model_type": "gemma2", "sliding_window": 48, "attention_chunk_size": 40}, 40),
        ({"model_type": "gemma", "sliding_window": None}, None),
    ],
)
def test_the_context_ends_where_a_window_begins_to_slide(text: Any, window: int | None) -> None:
    facts = read_facts(tiny(text={"max_position_embeddings": 64, **text}), "x")
    assert (facts.window, facts.context) == (window, window or 64)


POOLED = {"vision_config": {"image_size": 896, "patch_size": 14}}
TILED = {"vision_config": {"model_type": "siglip_vision_model", "image_size": 384}}
NAMED = {"image_token_index": 50265}
FITTING: dict[str, Any] = {  # what a class's defaults lack, or what in them does not fit the rest
    **dict.fromkeys(("gemma3", "idefics3", "shieldgemma2", "smolvlm"), POOLED),
    "aya_vision": {"vision_config": {"image_size": 364, "patch_size": 14}},
    **dict.fromkeys(("blip-2", "instructblip"), NAMED),
    "janus": {"vision_config": {"projection_dim": 4096}},
    "llava_onevision": {**TILED, "vision_feature_select_strategy": "full"},
}


def test_the_table_lists_families_by_model_type() -> None:
    for name in FAMILIES:
        facts = read_facts({"model_type": name, **FITTING.get(name, {})}, "x")
        assert facts.model_type == name
