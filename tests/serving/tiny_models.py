"""Tiny random checkpoints with processors and tokenizers of their own, for families that have no trained toy."""

import json

import torch
import transformers as hf
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
