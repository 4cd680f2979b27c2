"""Write a LLaVA checkpoint in the format of the Transformers library, which vLLM and others read too.

    python scripts/convert_to_transformers.py playground/toy/llava-toy-v1.5 converted/llava-toy-v1.5

LLaVA-1.5 becomes `LlavaForConditionalGeneration`, LLaVA-NeXT on Vicuna, Llama 3, Yi or Mistral
`LlavaNextForConditionalGeneration`, with weights named as on the hub, a processor, a chat template that writes the
checkpoint's own prompts, and a tokenizer that knows ``<image>``. Unpruned logits are those of the original.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    models,
)

from llava.checkpoint import CheckpointError, find_folder, read_json, read_tensors, read_weight_file, weight_files
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.model.checkpoint_files import TOWER_PREFIX, check_files, find_checkpoint, find_template

ROW_MULTIPLE = 64  # rows of the vocabulary: what tensor parallelism and matrix kernels like
PROJECTOR_LAYERS = {"0": "linear_1", "2": "linear_2"}
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
LANGUAGE_KEYS = (  # of config.json that describe the language model
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id"),
)
LANGUAGES = {"llava_llama": LlamaConfig, "llava_mistral": MistralConfig}  # by our name of the family


def convert(source: str, target: Path) -> None:
    """Convert the checkpoint ``source`` (folder or hub name) into the new folder ``target``.

    One weight file is in memory at a time, so that a model of any size can be converted.

    Raises:
        CheckpointError: a file of the checkpoint is missing or damaged.
        ValueError: a checkpoint that the library has no class for, or a target that is not empty.
    """
    folder, _, values = find_checkpoint(source)
    check_convertible(folder, values)
    check_files(folder, folder, values)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: choose a folder that does not exist yet")
    template = conv_templates[find_template(str(source))]
    chat_template = chat_template_of(template)
    tower_folder = find_folder(values.mm_vision_tower, near=folder)
    tokenizer = convert_tokenizer(folder, values)
    rows = -(-max(len(tokenizer), values.vocab_size + 1) // ROW_MULTIPLE) * ROW_MULTIPLE

    target.mkdir(parents=True, exist_ok=True)
    config = convert_config(folder, values, tower_folder, target, tokenizer, rows)
    config.save_pretrained(target)
    make_processor(values, config, tower_folder, tokenizer, chat_template).save_pretrained(target)
    write_weights(folder, tower_folder, target, rows)
    generation = generation_tokens(folder, tokenizer, template)
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for file in target.iterdir():  # safetensors makes files that only their owner can read
        file.chmod(0o644)


def check_convertible(folder: Path, values: Any) -> None:
    """Raise ValueError for a checkpoint that the library's two classes cannot express."""
    if values.model_type not in LANGUAGES:
        raise ValueError(
            f"{folder} is a {values.model_type}: this converts {', '.join(LANGUAGES)}. LLaVA-OneVision and LLaVA-NeXT "
            "on Qwen are on the hub in the library's format already (llava-hf/llava-onevision-qwen2-7b-ov-hf, "
            "llava-hf/llava-next-72b-hf)"
        )
    expected = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
    }
    for key, allowed in expected.items():
        value = getattr(values, key, None)
        if value not in allowed:
            raise ValueError(f"{folder} has {key} {value!r}; the library's LLaVA knows only {allowed[0]!r}")
    merge = getattr(values, "mm_patch_merge_type", "flat")
    shape = getattr(values, "image_aspect_ratio", None)
    if (shape == "anyres") != (merge == "spatial_unpad"):
        raise ValueError(
            f"{folder} has image_aspect_ratio {shape!r} with mm_patch_merge_type {merge!r}; the library knows anyres "
            "with spatial_unpad, and single views with flat"
        )


def convert_config(
    folder: Path, values: Any, tower_folder: Path, target: Path, tokenizer: Any, rows: int
) -> LlavaConfig:
    """The library's configuration; ``mm_vision_tower`` and ``mm_relevance_sign`` stay, for pruners that need CLIP.

    A tower in a folder is named from the folder ``target``, so that both can be moved together.
    """
    stored = read_json(folder / "config.json")
    given = {key: stored[key] for key in LANGUAGE_KEYS if stored.get(key) is not None}
    if values.model_type == "llava_mistral" and "sliding_window" in stored:
        given["sliding_window"] = stored["sliding_window"]  # null is none, and Mistral's default is one of 4096
    language = LANGUAGES[values.model_type](**given)
    language.vocab_size = rows
    language.architectures = [f"{language.model_type.capitalize()}ForCausalLM"]
    vision = CLIPVisionConfig.from_pretrained(tower_folder)
    is_local = tower_folder.as_posix().endswith(values.mm_vision_tower)  # otherwise it is a name on the hub
    shared = {
        "vision_config": vision.to_dict(),
        "text_config": language.to_dict(),
        "image_token_index": tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN),
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default" if values.mm_vision_select_feature == "patch" else "full",
        "vision_feature_layer": values.mm_vision_select_layer,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "tie_word_embeddings": False,
        "mm_vision_tower": os.path.relpath(tower_folder.resolve(), target.resolve())
        if is_local
        else values.mm_vision_tower,
    }
    if getattr(values, "mm_relevance_sign", None) is not None:
        shared["mm_relevance_sign"] = values.mm_relevance_sign
    if getattr(values, "image_aspect_ratio", None) == "anyres":
        pinpoints = [[height, width] for width, height in values.image_grid_pinpoints]  # the library turns them round
        config = LlavaNextConfig(**shared, image_grid_pinpoints=pinpoints)
        config.architectures = ["LlavaNextForConditionalGeneration"]
    else:
        config = LlavaConfig(**shared)
        config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = torch.float16
    return config


# --- prompts -------------------------------------------------------------------------------------------------------


def convert_tokenizer(folder: Path, values: Any) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer with ``<image>`` as one more token.

    LLaVA cuts the prompt at its pictures and gives the pieces to SentencePiece, which puts a space before each, but
    none after an end token within one. Here the prompt is one text that is cut at special tokens: the normaliser puts
    the space before every piece, and the end token is cut out only after that (``normalized``). A tokenizer of bytes
    (Llama 3's) puts no space anywhere, and stays as it is.
    """
    original = AutoTokenizer.from_pretrained(folder, config=values)
    end = original.eos_token
    original.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    backend = original.backend_tokenizer
    pieces = "ByteLevel" not in json.dumps(json.loads(backend.to_str())["pre_tokenizer"])
    if pieces:
        backend.normalizer = normalizers.Sequence(
            [
                normalizers.Prepend("▁"),
                normalizers.Replace(Regex(rf"\A▁{re.escape(end)}"), end),
                normalizers.Replace(" ", "▁"),
            ]
        )
        backend.pre_tokenizer = None
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["normalized"] = pieces and token["content"] == end
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token=original.bos_token,
        eos_token=AddedToken(end, special=True, normalized=pieces),
        unk_token=original.unk_token,
        pad_token=original.pad_token or original.unk_token or end,
        padding_side="left",
        model_max_length=getattr(values, "tokenizer_model_max_length", None) or original.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def generation_tokens(folder: Path, tokenizer: Any, template: Conversation) -> dict[str, Any]:
    """Tokens of ``generation_config.json``: the checkpoint's, and all that ends an answer.

    That is the tokenizer's end token, and what the template ends a turn with where that is another (ChatML, some of
    Llama 3's).
    """
    stored = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        stored |= read_json(folder / "generation_config.json")
    kept = {key: stored[key] for key in ("bos_token_id", "pad_token_id") if stored.get(key) is not None}
    ends = stored.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list) else [ends]
    ends += [tokenizer.eos_token_id, tokenizer.get_vocab().get(template.stop_string)]
    return kept | {"eos_token_id": [end for end in dict.fromkeys(ends) if end is not None]}


def chat_template_of(template: Conversation) -> str:
    """A Jinja template that writes what ``template.get_prompt`` writes, after the start token.

    Messages of the role "system" replace the checkpoint's own system text. The pictures of a message stand before its
    text, as LLaVA was trained, in whatever order they are given.

    Raises:
        ValueError: a style of conversation that no converted checkpoint has been trained with.
    """
    content = (
        "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
        "{%- for part in content -%}{%- if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endif -%}{%- endfor -%}"
        "{%- for part in content -%}{%- if part['type'] != 'image' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
    )
    system = (
        "{%- if messages[0]['role'] == 'system' -%}{%- set system = words(messages[0]['content']) -%}"
        "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = " + json.dumps(template.system) + " -%}"
        "{%- endif -%}{{ bos_token }}"
    )
    sep, sep2 = json.dumps(template.sep), json.dumps(template.sep2)
    user, assistant = (json.dumps(role) for role in template.roles)
    if template.sep_style is SeparatorStyle.TWO:
        body = (
            "{{ system + " + sep + " }}{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            "{{ " + user + " + ': ' + words(message['content']) + " + sep + " }}{%- else -%}"
            "{{ " + assistant + " + ': ' + words(message['content']) + " + sep2 + " }}{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ " + assistant + " + ':' }}{%- endif -%}"
        )
    elif template.sep_style is SeparatorStyle.MPT:
        body = (
            "{{ system + " + sep + " }}{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            "{{ " + user + " + words(message['content']) + " + sep + " }}{%- else -%}"
            "{{ " + assistant + " + words(message['content']) + " + sep + " }}{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ " + assistant + " }}{%- endif -%}"
        )
    elif template.sep_style is SeparatorStyle.LLAMA_2:
        body = (
            "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            "{{ (" + sep + " if not loop.first else '') + '[INST] ' }}"
            "{%- if loop.first and system -%}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{%- endif -%}"
            "{{ words(message['content']) + ' [/INST]' }}{%- else -%}"
            "{{ ' ' + words(message['content']) + ' ' + " + sep2 + " }}{%- endif -%}{%- endfor -%}"
        )
    elif template.sep_style is SeparatorStyle.LLAMA_3:
        body = (
            "{%- macro headed(role) -%}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{%- endmacro -%}"
            "{%- if system -%}{{ headed('system') + (system | trim) + " + sep + " }}{%- endif -%}"
            "{%- for message in messages -%}{{ headed(message['role']) + (words(message['content']) | trim) + "
            + sep
            + " }}{%- endfor -%}{%- if add_generation_prompt -%}{{ headed('assistant') }}{%- endif -%}"
        )
    else:
        raise ValueError(f"no chat template for conversations with {template.sep_style.value}")
    return content + system + body


def make_processor(
    values: Any, config: LlavaConfig, tower_folder: Path, tokenizer: Any, chat_template: str
) -> LlavaProcessor | LlavaNextProcessor:
    """The library's processor: pictures as the checkpoint was trained with them, text by its own template."""
    is_next = isinstance(config, LlavaNextConfig)
    module = models.llava_next if is_next else models.llava
    name = "LlavaNextImageProcessor" if is_next else "LlavaImageProcessor"
    settings = read_json(tower_folder / "preprocessor_config.json")
    for key in ("image_processor_type", "feature_extractor_type", "processor_class"):
        settings.pop(key, None)
    side = config.vision_config.image_size
    settings["size"] = {"shortest_edge": side}
    settings["crop_size"] = {"height": side, "width": side}
    if is_next:
        settings["image_grid_pinpoints"] = config.image_grid_pinpoints
    else:
        settings["do_pad"] = getattr(values, "image_aspect_ratio", None) == "pad"
    image_processor = getattr(module, f"{name}Pil", None) or getattr(module, name)
    processor_class = LlavaNextProcessor if is_next else LlavaProcessor
    return processor_class(
        image_processor=image_processor(**settings),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=chat_template,
    )


# --- weights -------------------------------------------------------------------------------------------------------


def write_weights(folder: Path, tower_folder: Path, target: Path, rows: int) -> None:
    """Rename and write the tensors, one file for each of the checkpoint's and one for the tower."""
    sources = list(weight_files(folder))
    files = [
        target / f"model-{number + 1:05d}-of-{len(sources) + 1:05d}.safetensors" for number in range(len(sources) + 1)
    ]
    tower = {f"vision_tower.{name}": t for name, t in read_tensors(tower_folder, ("vision_model.",)).items()}
    weight_map: dict[str, str] = {}
    size = 0

    def write(tensors: dict[str, Tensor], file: Path) -> None:
        nonlocal size
        size += sum(tensor.nbytes for tensor in tensors.values())
        weight_map.update(dict.fromkeys(tensors, file.name))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})

    for source, file in zip(sources, files[:-1], strict=True):
        tensors = {}
        for name, tensor in read_weight_file(source).items():
            if name.startswith(TOWER_PREFIX):  # a tower of the checkpoint's own wins over CLIP's
                tower["vision_tower." + name.removeprefix(TOWER_PREFIX)] = tensor
            elif not name.endswith("rotary_emb.inv_freq"):
                tensors[new_name(name)] = with_rows(tensor, rows) if name in VOCABULARY_TENSORS else tensor
        write(tensors, file)
    write({name: tensor for name, tensor in tower.items() if not name.endswith("position_ids")}, files[-1])
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def new_name(name: str) -> str:
    """A tensor's name as on the hub: language_model.*, multi_modal_projector.linear_1.*, image_newline."""
    if name == "model.image_newline":
        return "image_newline"
    if name.startswith("model.mm_projector."):
        layer, kind = name.split(".")[-2:]
        return f"multi_modal_projector.{PROJECTOR_LAYERS[layer]}.{kind}"
    return f"language_model.{name}"


def with_rows(table: Tensor, rows: int) -> Tensor:
    """A table of the vocabulary (v, d) with more rows, each the mean of the others.

    A mean row's logit is the mean of the logits: never the largest, so that no token is answered that has no meaning.
    """
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or hub name of a LLaVA-1.5 or LLaVA-NeXT checkpoint")
    parser.add_argument("target", type=Path, help="folder to write, which must not exist or be empty")
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.target)
    except (CheckpointError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"wrote {arguments.target}")


if __name__ == "__main__":
    main()
