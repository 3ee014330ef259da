"""What the general rules cannot know, by the model_type of the section it belongs to."""

from collections.abc import Iterable
from typing import Any

Changes = dict[str, Any]
REMOVE = ("transformers_version", "_name_or_path", "id2label", "label2id", "label_names")


def _same(names: str, changes: Changes) -> dict[str, Changes]:
    return dict.fromkeys(names.split(), changes)


def _mrope(*sections: int, **more: Any) -> Changes:
    """Rope in sections that fill half of the turning width of a head."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope | more}


def _layers(*kinds: str) -> Changes:
    return {"layer_types": [f"{kind}_attention" for kind in kinds]}


def _codes(names: Iterable[str]) -> dict[str, int]:
    """Ids of the words that stand for the codes of a discrete image."""
    return {name: 40 + code for code, name in enumerate(names)}


_ANGLES = _mrope(2, 1, 1)
_FEW_ANGLES = {"head_dim": 16, **_mrope(2, 1, 1, partial_rotary_factor=0.5)}
_MIXED_ANGLES = {
    "head_dim": 16,
    **_mrope(2, 1, 1, partial_rotary_factor=0.5, mrope_interleaved=True),
}
_SLIDING = _layers("sliding", "sliding", "sliding", "full") | {"sliding_window": 8}
_GEMMA_4 = _SLIDING | {"per_layer_config": {3: {"head_dim": 16}}}
_SAM = {"output_channels": 8, "window_size": 4, "image_size": 64}
_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
_OMNI = {"vision_start_token_id": 22, "vision_end_token_id": 23,
         "audio_start_token_id": 30, "audio_end_token_id": 31}  # fmt: skip

EXCEPTIONS: dict[str, Changes] = {
    # mRoPE: the classes give no sections, and those in the code are for heads of 128
    **_same("qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text glm4v_text glm_ocr_text", _ANGLES),
    **_same("paddleocr_vl_text", _ANGLES),
    **_same("qwen3_vl_text qwen3_vl_moe_text qwen3_omni_moe_text cosmos3_edge_text",
            _mrope(2, 1, 1, mrope_interleaved=True)),
    **_same("qwen3_5_text qwen3_5_moe_text", _MIXED_ANGLES),
    **_same("glm4v_moe_text", _FEW_ANGLES),
    "ernie4_5_vl_moe_text": _mrope(1, 1, 2),  # height and width have one size
    "hunyuan_vl_text": {"head_dim": 8, **_mrope(1, 1, 1, 1, rope_type="dynamic", alpha=1000.0,
                                                factor=1.0)},  # alpha: its own kind of rope
    "cohere_compass_text": _SLIDING | {  # the class gives no layer a window, its checkpoint does
        "rope_parameters": {f"{kind}_attention": _ANGLES["rope_parameters"]
                            for kind in ("full", "sliding")}},
    "lfm2": {  # the same: its checkpoints convolve
        "layer_types": ["conv", "conv", "full_attention", "full_attention"]},
    "minimax_m3_vl_text": {  # the same: its checkpoints select keys
        "layer_types": ["full_attention", *["minimax_m3_sparse"] * 3]},
    "step3p5": {"sliding_window": 8, **_layers("full", "sliding", "sliding", "full")},  # the same
    # fields that are None in the class and must be set
    "qwen4_exp_text": _MIXED_ANGLES | {"indexer_n_heads": 2, "indexer_kv_heads": 1,
                                       "indexer_head_dim": 16, "indexer_budget": 8,
                                       "indexer_compress_ratio": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                           "mlp_layer_types": ["dense", *["sparse"] * 3]},
    "diffusion_gemma_text": _GEMMA_4 | {"num_experts": 4, "top_k_experts": 2,
                                        "moe_intermediate_size": 32},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0], [-1, 1]],
                        "spatial_target_layers": [0, 1, 2, 3],
                        "vision_config": {"hidden_size": 64}},  # its Q-Former: a head per 64
    "chameleon": {"vocabulary_map": {"<image>": 4} | _codes(f"IMGIMG{c}Z" for c in "ABCDEFGH")},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 39}
             | _codes(f"<|visual token {code:06}|>" for code in range(8))},
    "instructblipvideo": {"video_token_index": 4},
    **_same("qwen2_5_omni_thinker qwen3_omni_moe_thinker", _OMNI),  # of the word before the image
    # wider heads in the last layer only
    "gemma4_unified_text": _GEMMA_4,
    "gemma4_unified_vision": {"mm_embed_dim": 16, "output_proj_dims": 16, "mm_posemb_size": 16},
    "gemma4_text": _GEMMA_4 | {"use_bidirectional_attention": "vision"},  # as its larger models
    # the sum of the two parts of a head
    **_same("dots3_note_text mistral4", {"head_dim": 16}),
    "unlimited_ocr_text": {"num_key_value_heads": 4},  # eager attention repeats no keys
    # towers: widths that other fields fix, and grids that must fit
    **_same("got_ocr2_vision pp_chart2table_vision sam_vision_model", _SAM),
    **_same("unlimited_ocr_sam_vision_model deepseek_ocr2_sam_vision_model",
            _SAM | {"downsample_channels": [16, 16]}),
    "pp_formulanet_vision": _SAM | {"post_conv_in_channels": 8, "post_conv_mid_channels": 16,
                                    "post_conv_out_channels": 32},
    "unlimited_ocr_vision_encoder": {"image_size": 16},
    "chameleon_vqgan": _VQ | {"num_embeddings": 8, "resolution": 32, "latent_channels": 32,
                              "embed_dim": 16},
    "emu3_vqgan": _VQ | {"codebook_size": 8, "hidden_size": 32},
    "janus_vqgan": _VQ | {"num_embeddings": 8, "embed_dim": 8, "latent_channels": 32,
                          "image_token_embed_dim": 32, "num_patches": 8},
    "florence_vision": {"patch_size": [7, 3, 3, 3], "depths": [1] * 4, "embed_dim": [8, 8, 8, 16],
                        "num_heads": [2] * 4, "num_groups": [2] * 4, "window_size": 4},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 48,
                            "num_global_layers": 1},
    "llama4_vision_model": {"vision_output_dim": 32, "projector_input_dim": 32,
                            "intermediate_size": 64},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 48},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 48, "hidden_size": 32,
                                "num_attention_heads": 4},
    "qwen2_vl_vision": {"hidden_size": 32, "embed_dim": 16},  # the former is the decoder's width
    "radio": {"max_img_size": 32, "patch_dim": 48, "video_patch_dim": 96},
    "inkling_vision": {"n_layers": 2},
    "inkling2_vision": {"patch_size": 2},
    "inkling_audio": {"mel_vocab_size": 4},
    "muse_spark_audio": {"hidden_sizes": [8, 16]},
    # towers of timm
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci0", "hidden_size": 128,
                                   "model_args": {"inference_mode": True, "layers": [1] * 4,
                                                  "embed_dims": [8, 16, 32, 64]}}},
    "perception_lm": {"vision_config": {"architecture": "vit_pe_core_tiny_patch16_384",
                                        "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2,
                                                       "img_size": [32, 32], "patch_size": 4}}},
    "gemma3n_vision": {"hidden_size": 2048, "vocab_size": 8, "vocab_offset": 48,
                       "model_args": {"channel_multiplier": 0.02}},
    "gemma3n_audio": {"vocab_size": 8, "vocab_offset": 56},
    "gemma3n": {"image_token_id": 49, "audio_token_id": 57},  # as published: behind the words
    "gemma3n_text": {  # the last two layers read the keys of the first two
        "vocab_size_per_layer_input": 48, "num_kv_shared_layers": 2, "sliding_window": 8,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        **_layers("sliding", "full", "sliding", "full")},
    # projectors
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    "kimi_k25": {"projection_hidden_size": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    **_same("muse_glimmer muse_spark", {"out_hidden_size": 64}),
    "vipllava": {"vision_feature_layer": [-2, -1, 1]},
}  # fmt: skip
