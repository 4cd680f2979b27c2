"""Writable copies of golden checkpoints, and changes to their files."""

import json
import shutil

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from llava.model.builder import load_pretrained_model
from records import GOLDEN, golden_checkpoint

CHECKPOINTS = GOLDEN / "checkpoints"
CLIP = "openai/clip-vit-large-patch14-336"
NEXT = "llava-v1.6-vicuna-tiny-wide"
NAMELESS = "0123456789abcdef"  # a folder whose name tells nothing
LLAMA_3_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def copy_checkpoint(name, place, called=None):
    """A copy in the folder ``place``, with CLIP where its relative name points."""
    shutil.copytree(CHECKPOINTS / CLIP, place / CLIP, dirs_exist_ok=True)
    return shutil.copytree(golden_checkpoint(name), place / (called or name))


def edit(folder, file="config.json", **values):
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | values))


def load_cpu(folder, **options):
    return load_pretrained_model(str(folder), device="cpu", **options)


def copy_mistral(place):
    """LLaVA-NeXT on Mistral, without a sliding window, as llava-v1.6-mistral-7b."""
    folder = copy_checkpoint(NEXT, place, NAMELESS)
    edit(folder, model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"], sliding_window=None)
    return folder


def copy_llama_3(place, end="<|eot_id|>"):
    """LLaVA-NeXT on Llama 3; ``end`` is its tokenizer's end token."""
    folder = copy_checkpoint(NEXT, place, NAMELESS)
    write_llama_3_tokenizer(folder, end)
    return folder


def copy_yi(place):
    """Yi-34B's kind: a Llama that speaks ChatML, and whose tokenizer adds no start token."""
    folder = copy_checkpoint(NEXT, place, NAMELESS)
    edit(folder, "tokenizer_config.json", add_bos_token=False)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 380, "<|im_end|>": 381}))
    return folder


def write_llama_3_tokenizer(folder, end):
    """Bytes and Llama 3's marks in the place of the tokenizer in ``folder``: a start token before, no end."""
    for file in ("tokenizer.model", "special_tokens_map.json"):
        (folder / file).unlink()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = dict.fromkeys((*LLAMA_3_MARKS, end))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    start = LLAMA_3_MARKS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
