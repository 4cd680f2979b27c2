"""Load a LLaVA checkpoint in its original format."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from llava.checkpoint import CheckpointError, find_folder, read_json, read_tensors, tensor_names, weight_files
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.mm_utils import get_model_name_from_path
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.multimodal_encoder.builder import tower_type
from llava.model.multimodal_encoder.siglip_encoder import folder_at_hand
from llava.pruning import Pruner
from llava.pruning.question_reader import QuestionReader
from llava.relevance.clip import check_joint_space
from llava.relevance.siglip import check_siglip_folder

# By `architectures`: OneVision's checkpoints call their model_type "llava", which is also what those of 2023 say.
FAMILIES = {LlavaConfig: LlavaLlamaForCausalLM, LlavaQwenConfig: LlavaQwenForCausalLM}
CONFIG_OF = {model.__name__: config for config, model in FAMILIES.items()}
MODEL_TYPES = {"llava": LlavaConfig, "llava_llama": LlavaConfig, "llava_qwen": LlavaQwenConfig}
TOWER_PREFIX = "model.vision_tower.vision_tower."
PROJECTOR_FILE = "mm_projector.bin"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")
TOY_FOLDER = Path(__file__).resolve().parents[2] / "playground" / "toy"
DEFAULT_CHECKPOINT = str(TOY_FOLDER / "llava-toy-v1.5")  # small and trained: answers on a laptop in seconds


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
        model_path: folder or hub name of a LLaVA-1.5 or LLaVA-NeXT checkpoint (Llama or Vicuna), or of LLaVA-Video or
            LLaVA-OneVision (Qwen2), .bin or safetensors, sharded or not, with or without the vision tower's weights.
        model_base: language model that ``model_path``, then a projector alone (``mm_projector.bin``), belongs to.
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
    try:
        folder = find_folder(model_path)
        base_folder = folder if model_base is None else find_folder(model_base)
        config = read_config(folder, base_folder)
        joint_folder = None if joint_space_path is None else find_folder(joint_space_path)
        if joint_folder is not None and config.mm_vision_tower_type != "siglip":
            raise ValueError(f"joint_space_path goes with towers of SigLIP; {config.mm_vision_tower} is its own")
        check_files(folder, base_folder, config, pruner, joint_folder)
    except CheckpointError as error:
        if TOY_FOLDER in Path(model_path).resolve().parents:
            raise CheckpointError(
                f"{error}. `python scripts/toy/train.py` rebuilds the toy in {TOY_FOLDER}"
            ) from error
        raise
    quantization = _quantization(load_8bit, load_4bit)
    device = pick_device(device)
    dtype = _pick_dtype(dtype, device, config)
    if quantization is not None and device_map is None:
        device_map = {"": device}

    # With our config the tokenizer's own files decide: "llava" in config.json would choose the library's LLaVA's.
    tokenizer = AutoTokenizer.from_pretrained(base_folder, config=config)
    model, report = FAMILIES[type(config)].from_pretrained(
        base_folder,
        config=config,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        quantization_config=quantization,
        output_loading_info=True,
    )
    missing = set(report["missing_keys"])
    if model_base is not None:
        missing -= load_projector(model, folder, dtype)
    if missing:
        raise CheckpointError(f"{base_folder} lacks {len(missing)} tensors of the model, first {min(missing)}")
    if device_map is None:
        model.to(device)
    _add_image_tokens(tokenizer, model)
    if model.cut_to_tokenizer and len(tokenizer) < model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    tower = model.get_vision_tower()
    if joint_folder is not None:
        tower.joint_folder = joint_folder
    inside = {name.removeprefix(TOWER_PREFIX): t for name, t in read_tensors(base_folder, (TOWER_PREFIX,)).items()}
    placement = next((p.device for p in model.get_model().mm_projector.parameters()), model.device)
    tower.load_model(near=folder, weights=inside, dtype=dtype, device=placement)
    if compile_tower:
        tower.compile_layers()
    _greedy_by_default(model)
    model.tokenizer = tokenizer
    model.model_name = model_name or get_model_name_from_path(str(model_path))
    model.eval()
    return tokenizer, model, tower.image_processor, context_length(config)


def context_length(config: LlavaConfig | LlavaQwenConfig) -> int:
    """What LLaVA's loaders of the two families tell of a checkpoint that does not say ``max_sequence_length``."""
    fallback = config.max_position_embeddings if isinstance(config, LlavaQwenConfig) else 2048
    return getattr(config, "max_sequence_length", fallback)


def read_config(folder: Path, base_folder: Path | None = None) -> LlavaConfig | LlavaQwenConfig:
    """Configuration of a checkpoint, by its ``architectures`` or else its ``model_type``.

    Args:
        base_folder: where the weights are, if not in ``folder``: they tell the kind of the vision tower.

    Raises:
        ValueError: a model of another family.
    """
    values = read_json(folder / "config.json")
    model_type, architecture = values.get("model_type"), next(iter(values.get("architectures") or []), None)
    family = CONFIG_OF.get(architecture, MODEL_TYPES.get(model_type))
    if family is None or model_type not in MODEL_TYPES or "mm_vision_tower" not in values:
        raise ValueError(
            f"{folder} is no LLaVA checkpoint in the original format: model_type {model_type!r}, expected one of "
            f"{', '.join(MODEL_TYPES)} with mm_vision_tower (llava-hf conversions are models of Transformers itself)"
        )
    values["model_type"] = family.model_type
    weights = [name for name in tensor_names(base_folder or folder) if name.startswith(TOWER_PREFIX)]
    values["mm_vision_tower_type"] = tower_type(values["mm_vision_tower"], folder, weights)
    if family is LlavaQwenConfig:
        values["rope_scaling"] = None  # as the published loader does
    return family.from_dict(values)


def check_files(
    folder: Path,
    base_folder: Path,
    config: LlavaConfig | LlavaQwenConfig,
    pruner: Pruner | None = None,
    joint_folder: Path | None = None,
) -> None:
    """Raise CheckpointError if a file that loading will need is missing, before anything large is read."""
    has = {name for name in TOKENIZER_FILES if (base_folder / name).is_file()}
    if not has & {"tokenizer.model", "tokenizer.json"} and not {"vocab.json", "merges.txt"} <= has:
        raise CheckpointError(f"missing file {base_folder / TOKENIZER_FILES[isinstance(config, LlavaQwenConfig)]}")
    weight_files(base_folder)
    if base_folder != folder and not (folder / PROJECTOR_FILE).is_file():
        raise CheckpointError(f"missing file {folder / PROJECTOR_FILE}")
    if config.mm_vision_tower_type == "siglip":
        named = joint_folder is not None
        joint_folder = joint_folder or folder_at_hand(config.mm_vision_tower, near=folder)
        if joint_folder is not None and (named or insists_on_clip(pruner)):
            check_siglip_folder(joint_folder)
        return
    tower_folder = find_folder(config.mm_vision_tower, near=folder)
    if not (tower_folder / "preprocessor_config.json").is_file():
        raise CheckpointError(f"missing file {tower_folder / 'preprocessor_config.json'}")
    if insists_on_clip(pruner):
        check_joint_space(tower_folder)


def insists_on_clip(pruner: Pruner | None) -> bool:
    """Whether a method cannot do without the joint space: "auto" reads the question elsewhere where it is missing."""
    return isinstance(pruner, QuestionReader) and pruner.relevance == "clip"


def pick_device(device: str) -> str:
    """Resolve "auto". Raises ValueError for CUDA without a GPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no GPU")
    return device


def _pick_dtype(dtype: str | torch.dtype, device: str, config: LlavaConfig | LlavaQwenConfig) -> torch.dtype:
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
    skipped = ["mm_projector", "lm_head"]
    if load_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=skipped,
    )


def load_projector(model: LlavaCausalLM, folder: Path, dtype: torch.dtype) -> set[str]:
    """Put the tensors of ``mm_projector.bin`` into the model; returns their names."""
    try:
        state = torch.load(folder / PROJECTOR_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives and foreign pickles raise classes of their own
        raise CheckpointError(f"damaged file {folder / PROJECTOR_FILE}: {error}") from error
    names = set(model.state_dict())
    foreign = sorted(set(state) - names)
    if foreign:
        raise CheckpointError(f"{folder / PROJECTOR_FILE} holds {foreign[0]}, which this model does not have")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False)
    return set(state)


def _add_image_tokens(tokenizer: PreTrainedTokenizerBase, model: LlavaCausalLM) -> None:
    """Checkpoints trained with marks around or inside images have them in their vocabulary."""
    tokens = []
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokens.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))


def _greedy_by_default(model: LlavaCausalLM) -> None:
    """Greedy unless asked otherwise; the library warns at every call of a temperature without sampling.

    A repetition penalty stays, as in the published loaders: "greedy" is penalised greedy where the checkpoint says so.
    """
    model.generation_config.update(temperature=None, top_p=None, top_k=None, do_sample=False, max_length=None)
