"""Tiny random checkpoints of Qwen3-VL, Qwen3.5 and Gemma 3, with processors and tokenizers of their own."""

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import CHATML, LANGUAGE, byte_tokenizer, hub_names, randomised
from tokenizers import AddedToken

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN += ["<|image_pad|>", "<|video_pad|>"]
TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
RECURRENT = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def qwen(folder, name, config_class, text, vision):
    """A checkpoint of one of Qwen's families whose tokens are patches of 28 pixels; returns the model."""
    tokenizer = byte_tokenizer(QWEN)
    ids = dict(zip(QWEN, tokenizer.convert_tokens_to_ids(QWEN), strict=True))
    config = config_class(
        vision_config={**TOWER, **vision},
        text_config={**LANGUAGE, "head_dim": 32, **text, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config.architectures = [name]
    torch.manual_seed(0)
    model = randomised(getattr(hf, name)._from_config(config))
    model.save_pretrained(folder)
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 80}
    shape = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    shape |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # vLLM normalises videos as it does pictures
    images = getattr(hf, "Qwen2VLImageProcessorPil", hf.Qwen2VLImageProcessor)(size=size, **shape)
    videos = hf.Qwen3VLVideoProcessor(size={**size, "longest_edge": 28 * 28 * 160}, **shape)
    hf.Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHATML).save_pretrained(folder)
    return model


def rope(**values):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True, **values}


def make_qwen3_vl(folder):
    text = {"rope_parameters": rope(mrope_section=[6, 5, 5]), "num_hidden_layers": 3}
    return qwen(
        folder, "Qwen3VLForConditionalGeneration", hf.Qwen3VLConfig, text, {"deepstack_visual_indexes": [0, 1]}
    )


def make_qwen3_vl_moe(folder):
    text = {"rope_parameters": rope(mrope_section=[6, 5, 5]), **EXPERTS, "num_hidden_layers": 3}
    model = qwen(
        folder, "Qwen3VLMoeForConditionalGeneration", hf.Qwen3VLMoeConfig, text, {"deepstack_visual_indexes": [0, 1]}
    )
    file = folder / "model.safetensors"
    own = {name: weight.shape for name, weight in model.named_parameters()}
    tensors = load_file(file)
    for name, weight in tensors.items():  # the hub's checkpoints have inputs before outputs
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")) and weight.shape == own[name]:
            tensors[name] = weight.mT.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return model


def make_qwen3_5(folder):
    text = {"rope_parameters": rope(mrope_section=[4, 2, 2], partial_rotary_factor=0.5), **RECURRENT}
    return qwen(folder, "Qwen3_5ForConditionalGeneration", hf.Qwen3_5Config, text, {})


def make_gemma3(folder):
    """Views of 64 patches that become 16 tokens; returns the model."""
    specials = ["<pad>", "<eos>", "<bos>", "<im_start>", "<im_end>", "<start_of_turn>", "<end_of_turn>"]
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_end|>", *specials, *marks.values()], extra_special_tokens=marks)
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in (4, 3, 2, 1)])
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(list(marks.values())), strict=True))
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**LANGUAGE, "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32, "num_hidden_layers": 2}
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**vision, image_size=112, patch_size=14),
        text_config=hf.Gemma3TextConfig(**text, layer_types=["sliding_attention", "full_attention"]),
        mm_tokens_per_image=16,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
        tie_word_embeddings=False,
    )
    config.architectures = ["Gemma3ForConditionalGeneration"]
    torch.manual_seed(0)
    model = randomised(hf.Gemma3ForConditionalGeneration._from_config(config))
    model.save_pretrained(folder)
    hub_names(folder)
    images = getattr(hf, "Gemma3ImageProcessorPil", hf.Gemma3ImageProcessor)(size={"height": 112, "width": 112})
    hf.Gemma3Processor(images, tokenizer, image_seq_length=16).save_pretrained(folder)
    return model
