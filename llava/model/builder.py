"""Load a LLaVA checkpoint in its original format."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from llava.checkpoint import (
    CheckpointError,
    check_finite,
    find_folder,
    read_tensors,
)
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.mm_utils import get_model_name_from_path
from llava.model.checkpoint_files import DEFAULT_CHECKPOINT as DEFAULT_CHECKPOINT
from llava.model.checkpoint_files import (
    FAMILIES,
    TOWER_PREFIX,
    AnyLlavaConfig,
    check_files,
    check_weights,
    context_length,
    find_checkpoint,
    read_added,
    saying_where_the_toy_is,
)
from llava.model.checkpoint_files import TOY_FOLDER as TOY_FOLDER
from llava.model.checkpoint_files import find_template as find_template  # also known from here
from llava.model.checkpoint_files import read_config as read_config
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.lora import has_adapter, merge_adapter, read_adapter
from llava.pruning import Pruner

BLOCK_OF_4_BITS = 64


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, Any] | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    pruner: Pruner | None = None,
    compile_tower: bool = False,
    joint_space_path: str | None = None,
) -> tuple[PreTrainedTokenizerBase, LlavaCausalLM, Any, int]:
    """Load tokenizer, model and image processor, ready for inference.

    Args:
        model_path: folder or hub name of a LLaVA-1.5 or LLaVA-NeXT checkpoint (Llama, Vicuna, Mistral, Yi), or of
            LLaVA-Video or LLaVA-OneVision (Qwen2), .bin or safetensors, sharded or not, with or without the vision
            tower's weights.
        model_base: language model that ``model_path`` belongs to where that is a projector alone
            (``mm_projector.bin``) or a LoRA adapter (``adapter_config.json``), which is merged into it.
        model_name: the name by which the conversation template is chosen; by default from the path.
        load_8bit, load_4bit: quantise the language model with bitsandbytes.
        device_map: spread the language model over devices with accelerate ("auto"); overrides ``device``.
        device: "auto" takes CUDA where there is a GPU, else the CPU.
        dtype: "auto" takes the checkpoint's own on an accelerator and float32 on a CPU.
        attn_implementation: of the language model, as Transformers names them; ``None`` lets the library choose.
        pruner: if given, the files it needs are checked before anything is loaded.
        compile_tower: put the vision tower through `torch.compile`: the first picture takes a minute, later ones less
            time than without.
        joint_space_path: folder or hub name of the full SigLIP, for methods that compare patches with the question;
            ``None`` takes the checkpoint's ``mm_vision_tower`` where that is on this machine. CLIP needs none.

    Returns:
        tokenizer, model, image processor, context length (as LLaVA's own loader tells it).

    Raises:
        CheckpointError: a file is missing or damaged; names it.
        ValueError: a checkpoint of another model family, or options that contradict each other.
        ImportError: bitsandbytes is needed and not installed; says how to install it.
    """
    folder, base_folder, config = find_checkpoint(model_path, model_base)
    joint_folder = None if joint_space_path is None else find_folder(joint_space_path)
    if joint_folder is not None and config.mm_vision_tower_type != "siglip":
        raise ValueError(f"joint_space_path goes with towers of SigLIP; {config.mm_vision_tower} is its own")
    with saying_where_the_toy_is(model_path):
        check_files(folder, base_folder, config, pruner, joint_folder)
    quantization = _quantization(load_8bit, load_4bit)
    if quantization is not None and has_adapter(folder):
        raise ValueError("a LoRA adapter cannot be merged into quantised weights: merge it first, save, and load that")
    device = pick_device(device)
    if quantization is not None and dtype == "auto" and device == "cpu":
        dtype = torch.float16  # what bitsandbytes casts to at every product otherwise, with a warning each time
    dtype = _pick_dtype(dtype, device, config)
    if load_4bit and device == "cpu" and device_map is None:
        _check_blocks(config)
    if quantization is not None and device_map is None:
        device_map = {"": device}

    added = read_added(folder, base_folder)
    check_weights(base_folder, config, added)
    # With our config the tokenizer's own files decide: "llava" in config.json would choose the library's LLaVA's.
    tokenizer = AutoTokenizer.from_pretrained(base_folder, config=config)
    model = FAMILIES[type(config)].from_pretrained(
        base_folder,
        config=config,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        quantization_config=quantization,
    )
    inside = {name: added.pop(name) for name in list(added) if name.startswith(TOWER_PREFIX)}
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in added.items()}, strict=False)
    if device_map is None:
        model.to(device)
    tower = model.get_vision_tower()
    if joint_folder is not None:
        tower.joint_folder = joint_folder
    inside = read_tensors(base_folder, (TOWER_PREFIX,)) | inside
    weights = {name.removeprefix(TOWER_PREFIX): tensor for name, tensor in inside.items()}
    placement = next((p.device for p in model.get_model().mm_projector.parameters()), model.device)
    tower.load_model(near=folder, weights=weights, dtype=dtype, device=placement)
    if has_adapter(folder):
        merge_adapter(model, *read_adapter(folder), folder)
    check_finite(model, base_folder)
    _add_image_tokens(tokenizer, model)
    if model.cut_to_tokenizer and len(tokenizer) < model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    if compile_tower:
        tower.compile_layers()
    _greedy_by_default(model)
    _end_where_the_tokenizer_does(model, tokenizer)
    model.tokenizer = tokenizer
    model.model_name = model_name or get_model_name_from_path(str(model_path))
    model.eval()
    return tokenizer, model, tower.image_processor, context_length(config)


def pick_device(device: str) -> str:
    """Resolve "auto" and check every other name.

    Raises:
        ValueError: no name of a device, or one that this machine does not have.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except (RuntimeError, TypeError):
        kind, index = None, 0
    if kind == "cpu":
        return device
    if kind == "cuda":
        count = torch.cuda.device_count()
        if index >= count:
            sees = f"{count} GPUs, cuda:0 to cuda:{count - 1}" if count else "no GPU"
            raise ValueError(f"device {device} was asked for, but torch sees {sees}")
        return device
    raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, got {device!r}")


def _pick_dtype(dtype: str | torch.dtype, device: str, config: AnyLlavaConfig) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"dtype must be auto, float32, float16 or bfloat16, got {dtype!r}")
        return found
    if device == "cpu":
        return torch.float32
    stored = config.dtype
    return stored if isinstance(stored, torch.dtype) else torch.float16


def _quantization(load_8bit: bool, load_4bit: bool) -> BitsAndBytesConfig | None:
    if not (load_8bit or load_4bit):
        return None
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("loading in 4 or 8 bits needs bitsandbytes: pip install bitsandbytes")
    skipped = ["model.mm_projector", "model.vision_tower", "lm_head"]  # matched from the start of a module's name
    if load_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=skipped,
    )


def _check_blocks(config: AnyLlavaConfig) -> None:
    """Raise ValueError for widths that bitsandbytes' 4 bits cannot cut into blocks on a CPU."""
    widths = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size")}
    for name, width in widths.items():
        if width % BLOCK_OF_4_BITS:
            raise ValueError(
                f"bitsandbytes' 4 bits on a CPU need widths that are multiples of {BLOCK_OF_4_BITS}, and this model "
                f"has {name}={width}: take 8 bits, or a GPU"
            )


def _add_image_tokens(tokenizer: PreTrainedTokenizerBase, model: LlavaCausalLM) -> None:
    """Checkpoints trained with marks around or inside images have them in their vocabulary.

    Raises:
        CheckpointError: the marks around images have no rows in it, so that they were never trained.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        marks = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
        tokenizer.add_tokens(marks, special_tokens=True)
        tokenizer.image_marks = tuple(tokenizer.convert_tokens_to_ids(marks))  # see tokenizer_image_token
        if max(tokenizer.image_marks) >= rows:
            raise CheckpointError(
                f"config.json says mm_use_im_start_end, but the vocabulary of {rows} rows has none for {marks}"
            )
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))


def _end_where_the_tokenizer_does(model: LlavaCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """An answer also ends with the tokenizer's end token, which configurations of Llama 3 do not all name."""
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    own = tokenizer.eos_token_id
    if own is not None and own not in ends:
        model.generation_config.eos_token_id = [end for end in ends if end is not None] + [own]


def _greedy_by_default(model: LlavaCausalLM) -> None:
    """Greedy, one answer, unless asked otherwise; the library warns at every call of a temperature without sampling.

    A repetition penalty stays, as in the published loaders: "greedy" is penalised greedy where the checkpoint says so.
    """
    one = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    model.generation_config.update(temperature=None, top_p=None, top_k=None, max_length=None, **one)
