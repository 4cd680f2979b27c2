"""Real processors of pictures and videos for tiny models, and a tokenizer of letters; they need torchvision."""

import shutil
import string

import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import llava.integrations.onevision_1_5  # noqa: F401 (known to the auto classes from then on)
from records import GOLDEN
from transformers_families import IMAGE, VIDEO, VOCABULARY, family

MARKS = {
    "qwen3_vl": {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", 9: "<|vision_start|>", 10: "<|vision_end|>"},
    "llava_onevision": {IMAGE: "<image>", VIDEO: "<video>"},
    "onevision_1_5": {60: "<|image_pad|>", 61: "<|video_pad|>", 62: "<|vision_start|>", 63: "<|vision_end|>"},
}
LETTERS = string.ascii_lowercase + string.digits + " \n.,:;?!'()-"
QWENS = "<|vision_start|>{}<|vision_end|>"
AROUND = {"qwen3_vl": QWENS, "llava_onevision": "{}", "onevision_1_5": QWENS}


def write_checkpoint(name, folder):
    """A tiny random model with its processor."""
    if name == "onevision_1_5":
        shutil.copytree(GOLDEN / "onevision_1_5", folder)
    else:
        family(name).model.save_pretrained(folder)
    processor_of(name).save_pretrained(folder)


def video_mark(name):
    """What stands for a video's tokens."""
    return list(MARKS[name].values())[1]


def processor_of(name):
    marks = MARKS[name]
    letters = iter(LETTERS)
    size = 64 if name == "onevision_1_5" else VOCABULARY
    special = {0: "<pad>", 1: "<start>", 2: "<end>", 3: "<unknown>"} | marks
    words = {special.get(number) or next(letters, f"<{number}>"): number for number in range(size)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokens.decoder = decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token="<unknown>",
        pad_token="<pad>",
        eos_token="<end>",
        extra_special_tokens=list(marks.values()),
    )
    template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'text' %} {{ part.text }} "
        f"{{% else %}}{AROUND[name].format(video_mark(name))}{{% endif %}}{{% endfor %}}{{% endfor %}}"
    )
    if name == "onevision_1_5":
        sizes = {"patch_size": 2, "merge_size": 2, "temporal_patch_size": 1}
        sizes |= {"size": {"shortest_edge": 16, "longest_edge": 2048}}
        pictures, videos = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen2VLVideoProcessor(**sizes)
        return hf.Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=template)
    if name == "qwen3_vl":
        sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 8192}}
        pictures, videos = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen3VLVideoProcessor(**sizes)
        return hf.Qwen3VLProcessor(pictures, tokenizer, videos, chat_template=template)
    sizes = {"size": {"height": 28, "width": 28}}
    pictures, videos = hf.LlavaOnevisionImageProcessor(**sizes), hf.LlavaOnevisionVideoProcessor(**sizes)
    options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "chat_template": template}
    return hf.LlavaOnevisionProcessor(pictures, tokenizer, videos, **options)
