"""Tiny random InternVL checkpoints in OpenGVLab's own layout, made from transformers' weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_internvl import IMAGE, PATCH, tiny_internvl, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

# as OpenGVLab writes it: a class and calls, of which the export reads one call's literals
CONVERSATION = """
class SeparatorStyle:
    MPT = 1
    INTERNVL_ZH = 2

register_conv_template(Conversation(name='other', sep_style=SeparatorStyle.MPT, sep='?'))
register_conv_template(
    Conversation(
        name='words',
        system_template='bottom {system_message}',
        system_message='yes',
        roles=('user ', 'assistant '),
        sep_style=SeparatorStyle.MPT,
        sep='</s>',
    )
)
raise SystemExit('this file is read, and never run')
"""


def internlm2(folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """InternLM2 behind a tower with RMSNorms and normed queries; ``changes`` of config.json."""
    model = tiny_internvl(seed, text="llama", norm_type="rms_norm", use_qk_norm=True)
    write(folder, model, "InternLM2ForCausalLM", changes)
    return model


def qwen2(folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Qwen2 behind a tower with LayerNorms and biases, as InternVL2-1B and InternVL3 are."""
    model = tiny_internvl(seed, text="qwen2", attention_bias=True)
    write(folder, model, "Qwen2ForCausalLM", changes)
    return model


def llama(folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """LLaMA behind InternLM2's tower, as InternVL 1.1 is."""
    model = tiny_internvl(seed, text="llama", norm_type="rms_norm", use_qk_norm=True)
    write(folder, model, "LlamaForCausalLM", changes)
    return model


def write(folder: Path, model: PreTrainedModel, architecture: str, changes: dict[str, Any]) -> None:
    """``model``'s weights and configuration as OpenGVLab saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**own_config(model, architecture), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "conversation.py").write_text(CONVERSATION)
    tiny_tokenizer(model.config.text_config.vocab_size).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "InternLM2Tokenizer", "extra_special_tokens": {}}
    tokenizer |= {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    save_file(own_tensors(model, architecture), folder / "model.safetensors")


def own_config(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    text, vision = model.config.text_config, model.config.vision_config
    llm = {name: getattr(text, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    )}  # fmt: skip
    own = {"bias": False} if architecture.startswith("InternLM2") else {"sliding_window": None}
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "llm_config": {
            "architectures": [architecture],
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "tie_word_embeddings": False,
            **own,
            **llm,
        },
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "norm_type": vision.norm_type,
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
            "layer_norm_eps": vision.layer_norm_eps,
        },
        "force_image_size": IMAGE,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 6,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "words",
        "torch_dtype": "float32",
    }


def own_tensors(model: PreTrainedModel, architecture: str) -> dict[str, Tensor]:
    """Named and fused as the modules of ``modeling_intern_vit`` and ``modeling_internlm2``."""
    inner, decoder = model.model, model.model.language_model
    embeddings, head = inner.vision_tower.embeddings, model.lm_head
    made = {
        "vision_model.embeddings.class_embedding": embeddings.cls_token,
        "vision_model.embeddings.position_embedding": embeddings.position_embeddings,
        **_of(embeddings.patch_embeddings.projection, "vision_model.embeddings.patch_embedding"),
        **_of(inner.multi_modal_projector.layer_norm, "mlp1.0"),
        **_of(inner.multi_modal_projector.linear_1, "mlp1.1"),
        **_of(inner.multi_modal_projector.linear_2, "mlp1.3"),
    }
    for number, layer in enumerate(inner.vision_tower.encoder.layer):
        made |= _vision_layer(layer, f"vision_model.encoder.layers.{number}.")
    if architecture == "InternLM2ForCausalLM":
        made |= _of(decoder.embed_tokens, "language_model.model.tok_embeddings")
        made |= _of(decoder.norm, "language_model.model.norm")
        made |= _of(head, "language_model.output")
        for number, layer in enumerate(decoder.layers):
            made |= _internlm2_layer(layer, f"language_model.model.layers.{number}.")
    else:
        plain = decoder.state_dict(prefix="language_model.model.")
        made |= plain | _of(head, "language_model.lm_head")
    return {name: tensor.detach().clone().contiguous() for name, tensor in made.items()}


def _vision_layer(layer: Any, at: str) -> dict[str, Tensor]:
    own = layer.attention
    thirds = [dict(part.named_parameters()) for part in (own.q_proj, own.k_proj, own.v_proj)]
    return {
        **{f"{at}attn.qkv.{key}": torch.cat([p[key] for p in thirds]) for key in thirds[0]},
        **_of(own.projection_layer, f"{at}attn.proj"),
        **_of(own.q_norm, f"{at}attn.q_norm"),
        **_of(own.k_norm, f"{at}attn.k_norm"),
        **_of(layer.layernorm_before, f"{at}norm1"),
        **_of(layer.layernorm_after, f"{at}norm2"),
        **_of(layer.mlp.fc1, f"{at}mlp.fc1"),
        **_of(layer.mlp.fc2, f"{at}mlp.fc2"),
        f"{at}ls1": layer.lambda_1,
        f"{at}ls2": layer.lambda_2,
    }


def _internlm2_layer(layer: Any, at: str) -> dict[str, Tensor]:
    """Of each key-value head: its queries, its key, its value."""
    own = layer.self_attn
    heads = [
        part.weight.unflatten(0, (-1, own.head_dim))
        for part in (own.q_proj, own.k_proj, own.v_proj)
    ]
    rows = [
        torch.cat((heads[0][g * own.num_key_value_groups :][: own.num_key_value_groups],
                   heads[1][g : g + 1], heads[2][g : g + 1]))
        for g in range(len(heads[1]))
    ]  # fmt: skip
    return {
        f"{at}attention.wqkv.weight": torch.cat(rows).flatten(0, 1),
        **_of(own.o_proj, f"{at}attention.wo"),
        **_of(layer.mlp.gate_proj, f"{at}feed_forward.w1"),
        **_of(layer.mlp.up_proj, f"{at}feed_forward.w3"),
        **_of(layer.mlp.down_proj, f"{at}feed_forward.w2"),
        **_of(layer.input_layernorm, f"{at}attention_norm"),
        **_of(layer.post_attention_layernorm, f"{at}ffn_norm"),
    }


def _of(module: torch.nn.Module, name: str) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in module.named_parameters(recurse=False)}
