"""The processors of tiny families without their part for videos, which needs torchvision: the library's own image
processor, and a tokenizer of words."""

import torch
import transformers as hf

from transformers_families import IMAGE, word_tokenizer


class Processor:
    """One picture in every prompt.

    Args:
        image_processor: of the library.
        tokens: of a picture, from what it made of it.
    """

    chat_template = "a word, the picture, the question"

    def __init__(self, image_processor, tokens):
        self.image_processor, self.tokens, self.tokenizer = image_processor, tokens, word_tokenizer()
        self.batch_decode = self.tokenizer.batch_decode

    def apply_chat_template(self, messages, **_):
        parts = messages[0]["content"]
        assert sorted(part["type"] for part in parts) == ["image", "text"]
        return f"w5 <image> {next(part['text'] for part in parts if part['type'] == 'text')}"

    def __call__(self, images, text, **_):
        (text,) = text
        (picture,) = images[0] if isinstance(images[0], list) else images
        made = self.image_processor(images=[picture], return_tensors="pt")
        before, after = (self.tokenizer(part, add_special_tokens=False).input_ids for part in text.split("<image>"))
        ids = torch.tensor([[*before, *[IMAGE] * self.tokens(made), *after]])
        made.pop("num_patches", None)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}
        if "image_grid_thw" in made:
            found["mm_token_type_ids"] = (ids == IMAGE).int()
        return hf.BatchFeature(found)


def qwen():
    """Tokens of 8 x 8 pixels, as many as the picture asks for."""
    limits = {"min_pixels": 8 * 8 * 4, "max_pixels": 8 * 8 * 80}
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, **limits)
    return Processor(images, lambda made: int(made["image_grid_thw"].prod()) // 4)


def intern():
    """Tiles of 28 x 28 pixels, 2 x 2 tokens each, and an overview behind them."""
    images = hf.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=12)
    return Processor(images, lambda made: 4 * len(made["pixel_values"]))


PROCESSORS = {"qwen2_vl": qwen, "qwen2_5_vl": qwen, "qwen3_vl": qwen, "internvl": intern}
