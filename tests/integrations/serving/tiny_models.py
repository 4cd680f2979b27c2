"""Tiny random checkpoints with processors and tokenizers of their own, for families that have no trained toy."""

import json

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
LANGUAGE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 320,
    "tie_word_embeddings": False,
}


def byte_tokenizer(specials, cls=hf.PreTrainedTokenizerFast, **options):
    """A tokenizer of single bytes and some special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return cls(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", **options)


def randomised(model):
    """Weights large enough that another token in the prompt is another answer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.12, generator=generator)
            elif "newline" in name:
                parameter.normal_(0, 1, generator=generator)
    return model.eval()


def make_qwen2_5_vl(folder):
    """Pictures of 28-pixel patches; returns the model."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(specials)
    ids = dict(zip(specials, tokenizer.convert_tokens_to_ids(specials), strict=True))
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**LANGUAGE, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    torch.manual_seed(0)
    model = randomised(hf.Qwen2_5_VLForConditionalGeneration._from_config(config))
    model.save_pretrained(folder)
    limits = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 80}
    images = getattr(hf, "Qwen2VLImageProcessorPil", hf.Qwen2VLImageProcessor)(**limits)
    hf.Qwen2_5_VLProcessor(images, tokenizer, hf.Qwen2VLVideoProcessor(), chat_template=CHATML).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["text_config"]["architectures"] = ["Qwen2ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(saved))
    return model


def make_llava_onevision(folder):
    """Views of 4 x 4 patches, frames of 2 x 2; returns the model."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = byte_tokenizer(specials)
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**vision, image_size=56, patch_size=14),
        text_config=hf.Qwen2Config(**LANGUAGE, bos_token_id=None, eos_token_id=258),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    torch.manual_seed(0)
    model = randomised(hf.LlavaOnevisionForConditionalGeneration._from_config(config))
    model.save_pretrained(folder)
    hub_names(folder)
    size = {"height": 56, "width": 56}
    images = getattr(hf, "LlavaOnevisionImageProcessorPil", hf.LlavaOnevisionImageProcessor)
    hf.LlavaOnevisionProcessor(
        images(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n"),
    ).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["text_config"]["architectures"] = ["Qwen2ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(saved))
    return model


def hub_names(folder):
    """Write the weights under the names of the hub's checkpoints, which vLLM reads."""
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = "vision_tower.vision_model." + name.removeprefix("vision_tower.")
        tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


INTERNVL_CONFIG = """
from transformers import PretrainedConfig, Qwen3Config


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **values):
        super().__init__(**values)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.text_config = self.llm_config = Qwen3Config(**(llm_config or {}))
"""


def make_internvl(folder):
    """Configuration and tokenizer, tiles of 64 patches that become 16 tokens; weights are left to the engine."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>"]
    byte_tokenizer(specials).save_pretrained(folder)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_channels": 3,
        "image_size": 112,
        "patch_size": 14,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "initializer_factor": 0.1,
        "hidden_act": "gelu",
    }
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": vision,
        "llm_config": {**LANGUAGE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "template": "internvl2_5",
        "dynamic_image_size": True,
        "force_image_size": 112,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "use_thumbnail": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_internvl_chat.py").write_text(INTERNVL_CONFIG)
