"""Tiny random models of the Transformers library's own classes, and prompts for them with ids made by hand.

Processors of most families cannot be loaded offline, so ids, pixels and grids are made here as they would make them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

IMAGE, VIDEO, BREAK = 120, 121, 119  # token ids
VOCABULARY = 128
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
SIZES = [(28, 50), (56, 40), (56, 56)]  # (height, width) of the three images


@dataclass
class Family:
    """A model, and the visual arguments of three images or of one video for it.

    Args:
        images, video: arguments of `forward`; ``None`` where the family has none.
        image_tokens, video_tokens: for each image, or piece of the video that stands alone in the prompt, its tokens.
        between: text tokens between pieces of one image or video.
    """

    name: str
    model: torch.nn.Module
    images: dict[str, torch.Tensor]
    image_tokens: list[int]
    video: dict[str, torch.Tensor] | None = None
    video_tokens: list[int] | None = None
    video_token: int = VIDEO
    adjacent: bool = True  # whether two images can stand side by side
    token_types: str | None = None

    def prompts(self, rows, shown, video=False, padding="left"):
        """Arguments of a call: ``rows`` of pieces (so many text tokens, "image", "video"), the ``shown`` images."""
        counts = iter(self.image_tokens[i] for i in shown)
        generator = torch.Generator().manual_seed(5)
        lines = []
        for pieces in rows:
            line = [1]
            for piece in pieces:
                if piece == "image":
                    line += [IMAGE] * next(counts)
                elif piece == "video":
                    for number, tokens in enumerate(self.video_tokens):
                        line += [7] * (number > 0) + [self.video_token] * tokens
                else:
                    line += torch.randint(4, 110, (piece,), generator=generator).tolist()
            lines.append(line)
        width = max(map(len, lines))
        ids = torch.zeros(len(lines), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, row, own in zip(lines, ids, mask, strict=True):
            place = slice(width - len(line), width) if padding == "left" else slice(0, len(line))
            row[place] = torch.tensor(line)
            own[place] = 1
        arguments = {"input_ids": ids, "attention_mask": mask}
        if shown:
            arguments |= self.pick(shown, [sum(p == "image" for p in pieces) for pieces in rows])
        if video:
            arguments |= self.video
        if self.token_types == "mm_token_type_ids":
            arguments["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        elif self.token_types == "token_type_ids":
            arguments["token_type_ids"] = (ids == IMAGE).long()
        elif self.token_types == "prefix":
            arguments["token_type_ids"] = torch.zeros_like(ids)
        return arguments

    def pick(self, shown, per_row):
        """The visual arguments of some of the images."""
        if "image_grid_thw" in self.images:
            grids = self.images["image_grid_thw"]
            pieces = self.images["pixel_values"].split(grids.prod(-1).tolist())
            return {
                "pixel_values": torch.cat([pieces[i] for i in shown]),
                "image_grid_thw": grids[list(shown)],
            }
        if self.name in ("idefics3", "smolvlm"):  # (rows, most images, 3, s, s), zeros where a row has fewer
            pixels = self.images["pixel_values"]
            rows = pixels.new_zeros(len(per_row), max(per_row), *pixels.shape[1:])
            shown = iter(shown)
            for row, count in enumerate(per_row):
                for place in range(count):
                    rows[row, place] = pixels[next(shown)]
            return {"pixel_values": rows}
        if self.name == "internvl":  # two tiles an image
            return {"pixel_values": torch.cat([self.images["pixel_values"][2 * i : 2 * i + 2] for i in shown])}
        picked = {name: value[list(shown)] for name, value in self.images.items()}
        if self.name == "llava_onevision":
            picked["batch_num_images"] = torch.tensor([count for count in per_row if count])
        return picked

    def batch(self):
        """Two rows, padded on the left: one image, and two of them."""
        between = [] if self.adjacent else [1]
        return self.prompts([[3, "image", 5], [2, "image", *between, "image", 4]], [0, 1, 2])

    def single(self, row):
        """A row of `batch` alone, without padding."""
        arguments = self.batch()
        own = arguments["attention_mask"][row].bool()
        shown = [0] if row == 0 else [1, 2]
        alone = {
            name: value[row : row + 1, own]
            for name, value in arguments.items()
            if name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        }
        return alone | self.pick(shown, [len(shown)])


def pixels(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def clip(**options):
    return hf.CLIPVisionConfig(**TOWER | {"projection_dim": 16} | options)


def siglip(**options):
    return hf.SiglipVisionConfig(**TOWER | options)


def built(cls, config):
    torch.manual_seed(0)
    config.image_token_id = IMAGE
    model = cls._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.normal_(0, 0.15)
        elif name.endswith("image_newline"):
            parameter.normal_(0, 1)
    model.generation_config = hf.GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def make_llava():
    config = hf.LlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, image_seq_length=16
    )
    return Family(
        "llava", built(hf.LlavaForConditionalGeneration, config), {"pixel_values": pixels(3, 3, 28, 28)}, [16] * 3
    )


def tiled_images():
    return {"pixel_values": pixels(3, 5, 3, 28, 28), "image_sizes": torch.tensor(SIZES)}


def packed_counts(model, images):
    return [len(one) for one in model.model.get_image_features(**images).pooler_output]


def make_llava_next():
    config = hf.LlavaNextConfig(
        vision_config=clip(),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    model = built(hf.LlavaNextForConditionalGeneration, config)
    return Family("llava_next", model, tiled_images(), packed_counts(model, tiled_images()))


def make_llava_next_video():
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        spatial_pool_stride=2,
    )
    model = built(hf.LlavaNextVideoForConditionalGeneration, config)
    video = {"pixel_values_videos": pixels(1, 3, 3, 28, 28)}
    return Family("llava_next_video", model, tiled_images(), packed_counts(model, tiled_images()), video, [12])


def make_llava_onevision():
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    model = built(hf.LlavaOnevisionForConditionalGeneration, config)
    video = {"pixel_values_videos": pixels(1, 3, 3, 28, 28)}
    # Alone in its row an image is tiled; of several, each is one view with a newline.
    alone = packed_counts(model, tiled_images() | {"batch_num_images": torch.tensor([1, 1, 1])})
    return Family("llava_onevision", model, tiled_images(), [alone[0], 17, 17], video, [13])


def make_video_llava():
    config = hf.VideoLlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO
    )
    model = built(hf.VideoLlavaForConditionalGeneration, config)
    video = {"pixel_values_videos": pixels(1, 3, 3, 28, 28)}
    old = "pixel_values_images" in inspect.signature(type(model).forward).parameters  # before Transformers 5.23
    images = {"pixel_values_images" if old else "pixel_values": pixels(3, 3, 28, 28)}
    return Family("video_llava", model, images, [16] * 3, video, [51])


def make_internvl():
    vision = hf.InternVLVisionConfig(**TOWER | {"image_size": [28, 28], "patch_size": [7, 7]})
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    model = built(hf.InternVLForConditionalGeneration, config)
    return Family("internvl", model, {"pixel_values": pixels(6, 3, 28, 28)}, [8] * 3, adjacent=False)


GRIDS = torch.tensor([[1, 8, 6], [1, 4, 8], [1, 6, 6]])


def qwen(name, model, patch):
    def grid_pixels(grids):
        return pixels(int(grids.prod(-1).sum()), 3 * 2 * patch * patch)

    images = {"pixel_values": grid_pixels(GRIDS), "image_grid_thw": GRIDS}
    grid = torch.tensor([[3, 4, 6]])
    video = {"pixel_values_videos": grid_pixels(grid), "video_grid_thw": grid}
    pieces = [6, 6, 6] if name == "qwen3_vl" else [18]  # Qwen3-VL writes time stamps between frames
    if name == "qwen2_5_vl":
        video["second_per_grid_ts"] = torch.tensor([1.0])
    return Family(name, model, images, [12, 8, 9], video, pieces, token_types="mm_token_type_ids", adjacent=False)


def qwen_text(sections):
    return TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}}


def make_qwen2_vl():
    config = hf.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 24,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        text_config=qwen_text([1, 1, 2]),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return qwen("qwen2_vl", built(hf.Qwen2VLForConditionalGeneration, config), 4)


def make_qwen2_5_vl():
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config=qwen_text([1, 1, 2]),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return qwen("qwen2_5_vl", built(hf.Qwen2_5_VLForConditionalGeneration, config), 4)


def make_qwen3_vl():
    config = hf.Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=qwen_text([2, 1, 1]) | {"head_dim": 8},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return qwen("qwen3_vl", built(hf.Qwen3VLForConditionalGeneration, config), 4)


def make_idefics3():
    config = hf.Idefics3Config(
        vision_config=TOWER, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    model = built(hf.Idefics3ForConditionalGeneration, config)
    return Family("idefics3", model, {"pixel_values": pixels(3, 3, 28, 28)}, [4] * 3, adjacent=False)


def make_smolvlm():
    config = hf.SmolVLMConfig(
        vision_config=TOWER, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    model = built(hf.SmolVLMForConditionalGeneration, config)
    return Family("smolvlm", model, {"pixel_values": pixels(3, 3, 28, 28)}, [4] * 3, adjacent=False)


def make_gemma3():
    text = hf.Gemma3TextConfig(
        **TEXT | {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    )
    config = hf.Gemma3Config(
        vision_config=siglip(), text_config=text, image_token_id=IMAGE, mm_tokens_per_image=4, pad_token_id=0
    )
    model = built(hf.Gemma3ForConditionalGeneration, config)
    return Family(
        "gemma3", model, {"pixel_values": pixels(3, 3, 28, 28)}, [4] * 3, adjacent=False, token_types="token_type_ids"
    )


def make_mistral3():
    vision = hf.PixtralVisionConfig(**TOWER | {"image_size": 56, "head_dim": 12})
    config = hf.Mistral3Config(
        vision_config=vision,
        text_config=hf.MistralConfig(**TEXT | {"sliding_window": None}),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    model = built(hf.Mistral3ForConditionalGeneration, config)
    images = {"pixel_values": pixels(3, 3, 56, 56), "image_sizes": torch.tensor([(56, 56), (28, 56), (56, 28)])}
    return Family("mistral3", model, images, [16, 8, 8])


def make_aya_vision():
    config = hf.AyaVisionConfig(
        vision_config=siglip(),
        text_config=hf.Cohere2Config(
            **TEXT | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
        ),
        image_token_id=IMAGE,
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = built(hf.AyaVisionForConditionalGeneration, config)
    return Family("aya_vision", model, {"pixel_values": pixels(3, 3, 28, 28)}, [4] * 3, adjacent=False)


def make_paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=hf.GemmaConfig(**TEXT | {"head_dim": 8}),
        image_token_id=IMAGE,
        projection_dim=32,
    )
    model = built(hf.PaliGemmaForConditionalGeneration, config)
    return Family("paligemma", model, {"pixel_values": pixels(3, 3, 28, 28)}, [16] * 3, token_types="prefix")


MAKERS = {name.removeprefix("make_"): make for name, make in globals().items() if name.startswith("make_")}


@cache
def family(name: str) -> Family:
    return MAKERS[name]()


def word_tokenizer():
    """A tokenizer whose tokens are the words w0, w1, ..., with the placeholders as the models know them."""
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3", pad_token="w0")
