"""Tiny random instances of the Transformers library's image-text classes, from their own default configurations.

Nothing is downloaded. Widths, depths and vocabularies are replaced by small ones wherever a configuration has a field
of such a name; what the replacement cannot know of a family stands in `HINTS`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

IMAGE, VIDEO, START, END, AUDIO = 120, 121, 118, 117, 116  # token ids
VOCABULARY = 128

TEXT = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 512,
    # widths and depths
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "sliding_window": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    # experts
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # compressed keys and values
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "qk_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    # recurrent layers
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    # embeddings for each layer, shared keys and values, heads for several tokens
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "mtp_num_hidden_layers": 0,
    "num_nextn_predict_layers": 0,
}
TOWER = {
    "hidden_size": 24,
    "embed_dim": 24,
    "hidden_dim": 24,
    "d_model": 24,
    "width": 24,
    "intermediate_size": 32,
    "mlp_dim": 32,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_layers": 2,
    "layers": 2,
    "encoder_layers": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "image_size": 28,
    "patch_size": 7,
    "window_size": 16,
    "out_hidden_size": 32,
    "projection_dim": 16,
    "num_position_embeddings": 64,
    "position_embedding_size": 64,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "default_output_length": 4,
    "vocab_size": VOCABULARY,
}
ONLY_IF_SET = {"kv_lora_rank", "q_lora_rank", "o_lora_rank", "sliding_window", "num_local_experts", "image_size"}
SPECIAL_TOKENS = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "image_patch_id": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "audio_token_id": AUDIO,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LANGUAGE = re.compile("text|language|llm|decoder")

SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MROPE = {"rope_parameters": SECTIONS}

SAM = {"image_size": 112, "output_channels": 8, "downsample_channels": [16, 24], "global_attn_indexes": [0, 1]}

# By model type, then by part ("" is the whole): what a family needs beside the small sizes.
HINTS: dict[str, dict[str, dict[str, Any]]] = {
    "aria": {"": {"projector_patch_to_query_dict": {16: 4}}},
    "chameleon": {"": {"vocabulary_map": {"<image>": IMAGE}}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": SECTIONS}}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config.sam_config": SAM,
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0, 1]}},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"adapter_in_dim": 24, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 24, "adapter_out_dim": 32},
    },
    "emu3": {
        "": {
            "vocabulary_map": {"<|extra_200|>": 5, "<image>": IMAGE}
            | {f"<|visual token {code:06}|>": 20 + code for code in range(64)}
        },
        "vq_config": {"base_channels": 32, "hidden_size": 128, "codebook_size": 64},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": SECTIONS | {"mrope_section": [1, 1, 2]}}},
    "fast_vlm": {
        "vision_config": {
            "architecture": "fastvit_mci3",
            "hidden_size": 3072,
            "model_args": {"inference_mode": True},
            "image_size": 256,
            "patch_size": 64,
        }
    },
    "gemma3": {"": {"mm_tokens_per_image": 4}, "vision_config": {"image_size": 56}},
    "gemma3n": {
        "": {"vision_soft_tokens_per_image": 256},
        "text_config": {"intermediate_size": 48},
        "vision_config": {"hidden_size": 2048, "image_size": 112, "patch_size": 7},
    },
    "glm46v": {"text_config": MROPE},
    "glm4v": {"text_config": MROPE},
    "glm4v_moe": {"text_config": MROPE | {"head_dim": 16}},
    "glm5_next": {
        "text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4}
    },
    "glm_ocr": {"text_config": MROPE},
    "glmga": {"text_config": MROPE},
    "got_ocr2": {"vision_config": {"image_size": 112}},
    "granite4_vision": {
        "": {"deepstack_layer_map": [(-1, 0)], "downsample_rate": "1/2"},
        "vision_config": {"hidden_size": 64},
    },
    "granite_docling": {"vision_config": {"image_size": 112}},
    "hunyuan_vl": {"text_config": MROPE},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling_mm_model": {
        "vision_config": {"patch_size": 8, "num_hidden_layers": 4, "text_hidden_size": 32},
    },
    "janus": {"vision_config": {"num_image_tokens": 16, "projection_dim": 32}},
    "kimi_k25": {"": {"projection_hidden_size": 24}, "text_config": {"num_key_value_heads": 4, "head_dim": 4}},
    "llama4": {
        "vision_config": {
            "intermediate_size": 96,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
            "vision_output_dim": 24,
        }
    },
    "llavaonevision1_5": {"vision_config": {"text_hidden_size": 32}},
    "mistral_large4": {"text_config": {"num_key_value_heads": 4, "head_dim": 4}},
    "molmo2": {
        "": {"video_token_id": IMAGE},
        "vision_config": {"num_position_embeddings": 16},
        "adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 32},
    },
    "muse_glimmer": {"": {"out_hidden_size": 96, "projector_hidden_size": 32}},
    "muse_spark": {
        "": {"out_hidden_size": 96, "projector_hidden_size": 32},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    },
    "nemotron_h_omni": {
        "": {"vision_hidden_size": 24, "projector_hidden_size": 24},
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "ovis2": {"": {"hidden_size": 32, "vocab_size": VOCABULARY}},
    "paddleocr_vl": {"text_config": MROPE},
    "paligemma": {"": {"projection_dim": 32}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "do_pooling": False,
            "model_args": {
                "embed_dim": 24,
                "depth": 2,
                "num_heads": 2,
                "img_size": (56, 56),
                "patch_size": 7,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": (8, 8),
            },
            "image_size": 56,
            "patch_size": 7,
        }
    },
    "pp_chart2table": {"vision_config": {"image_size": 112}},
    "qwen2_5_omni_thinker": {"": {"vision_start_token_id": START}, "text_config": MROPE},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE, "vision_config": {"hidden_size": 32}},
    "qwen3_omni_moe_thinker": {"": {"vision_start_token_id": START}, "text_config": MROPE},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
        }
    },
    "shieldgemma2": {"": {"mm_tokens_per_image": 4}, "vision_config": {"image_size": 56}},
    "step3p7": {"text_config": {"sliding_window": 16}, "vision_config": {"image_size": 112}},
    "unlimited_ocr": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config.sam_config": SAM,
    },
    "vipllava": {"": {"vision_feature_layers": [-1, -2]}},
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]  # sizes that pictures are cut into tiles at


def small_fields(config: Any, part: str) -> dict[str, Any]:
    """The fields of a configuration that are replaced, with their small values in the form of the default ones."""
    defaults = config.to_dict()
    fields = {
        name: shaped(small, defaults[name])
        for name, small in (TEXT if LANGUAGE.search(part) else TOWER).items()
        if name in defaults and not (name in ONLY_IF_SET and defaults[name] is None)
    }
    kinds = list(dict.fromkeys(defaults.get("layer_types") or ()))  # one layer of each kind
    if kinds:
        fields["layer_types"] = kinds * (2 if len(kinds) == 1 else 1)
        fields["num_hidden_layers"] = len(fields["layer_types"])
    if defaults.get("mlp_layer_types"):
        dense, *_, sparse = defaults["mlp_layer_types"]
        fields["mlp_layer_types"] = [dense] + [sparse] * (fields["num_hidden_layers"] - 1)
    rope = defaults.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        fields["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    return fields


def shaped(small: Any, default: Any) -> Any:
    """A small value as a list, a tuple or a float where the default is one."""
    if isinstance(default, (list, tuple)) and not isinstance(small, list):
        return type(default)([small] * len(default))
    if isinstance(default, tuple):
        return tuple(small)
    return float(small) if isinstance(default, float) else small


def small_config(model_type: str) -> Any:
    """The default configuration of a model type with small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return smaller(CONFIG_MAPPING[model_type](), "text", HINTS.get(model_type, {}))


def smaller(config: Any, name: str, hints: dict[str, dict[str, Any]]) -> Any:
    """A configuration and its parts with small sizes.

    Args:
        name: of the part that it is.
        hints: fields by part, "" for the whole.
    """
    kind = type(config)
    parts = {part: getattr(config, part, None) for part in getattr(kind, "sub_configs", {})}
    if "vision_config" in parts and parts["vision_config"] is None:  # some may leave it out
        parts["vision_config"] = kind.sub_configs["vision_config"]()
    parts = {part: own for part, own in parts.items() if own is not None}
    fields = {} if any(LANGUAGE.search(part) for part in parts) else small_fields(config, name)
    for part, own in parts.items():
        below = {place.partition(".")[2]: values for place, values in hints.items() if place.partition(".")[0] == part}
        fields[part] = smaller(own, part, below)
    fields |= {token: value for token, value in SPECIAL_TOKENS.items() if hasattr(config, token)}
    if hasattr(config, "image_grid_pinpoints"):
        fields["image_grid_pinpoints"] = PINPOINTS
    return kind(**fields | hints.get("", {}))


def build(cls: type[nn.Module], config: Any) -> nn.Module:
    """A random instance whose answers depend on what it is shown."""
    from transformers import GenerationConfig

    torch.manual_seed(0)
    try:
        model = cls._from_config(config, attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product" not in str(error):
            raise
        model = cls._from_config(config, attn_implementation="eager")
    model = model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.normal_(0, 0.15)
        elif name.endswith(("image_newline", "view_seperator", "view_separator")):
            parameter.normal_(0, 1)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model
