"""What must be known of a model class of the Transformers library before a pruner can attach to it.

The pattern: ``model.model`` computes visual features in ``get_image_features`` (``get_video_features``), puts them
where the prompt has placeholder tokens, and calls one language model, ``language_model`` or ``text_model``, with
``inputs_embeds=``. Most image-text-to-text classes of the library are written so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from llava.integrations.transformers.compiled import is_wrapper

TESTED_CLASSES = (  # those that work in docs/hosts.md
    "AriaForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "CohereCompassForConditionalGeneration",
    "Cosmos3EdgeForConditionalGeneration",
    "Cosmos3OmniForConditionalGeneration",
    "DeepseekOcr2ForConditionalGeneration",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLHybridForConditionalGeneration",
    "Dots3NoteForConditionalGeneration",
    "Emu3ForConditionalGeneration",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "FastVlmForConditionalGeneration",
    "FuyuForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration",
    "Glm46VForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "Glm5NextForConditionalGeneration",
    "GlmOcrForConditionalGeneration",
    "GotOcr2ForConditionalGeneration",
    "GraniteDoclingForConditionalGeneration",
    "HunYuanVLForConditionalGeneration",
    "HyperCLOVAXVisionV2ForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "Inkling2ForConditionalGeneration",
    "InklingForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "JanusForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Lfm3VlForConditionalGeneration",
    "LLaVAOneVision1_5_ForConditionalGeneration",
    "LightOnOcrForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "MiniCPMOcrForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "MiniCPMV4_7ForConditionalGeneration",
    "MiniMaxM3SparseForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MistralLarge4ForConditionalGeneration",
    "Molmo2ForConditionalGeneration",
    "MuseGlimmerForConditionalGeneration",
    "MuseSparkForConditionalGeneration",
    "NemotronH_Omni_Reasoning_V3",
    "Ovis2ForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "PerceptionLMForConditionalGeneration",
    "QianfanOCRForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen4ExpForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "Step3p7ForConditionalGeneration",
    "UnlimitedOcrForConditionalGeneration",
    "VideoLlama3ForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
)

SUFFIX = "ForConditionalGeneration"

# Arguments of `forward` that are about the prompt's tokens or about the call, not about pictures.
NOT_VISUAL = {
    "self",
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "labels",
    "use_cache",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "cache_position",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "router_labels",
    "return_dict",
}
PICTURES = ("pixel_values", "image_patches")  # beginnings of the names of arguments that are a picture or a video
DEEP_FEATURES = {"visual_pos_masks", "deepstack_visual_embeds"}  # what a language model may get beside its embeddings
VISUAL_WORDS = ("vision", "visual", "deepstack", "image", "cross_attention")  # in names of more than that
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class UnsupportedModelError(ValueError):
    """A model that a pruner cannot attach to; the message says why and lists the classes that it can.

    Attributes:
        reason: why, without the list.
    """

    def __init__(self, model: nn.Module, reason: str) -> None:
        self.reason = reason
        names = ", ".join(name.removesuffix(SUFFIX) for name in TESTED_CLASSES)
        super().__init__(
            f"{type(model).__name__} cannot be pruned: {reason}. Classes that are tested, most of them called "
            f"...{SUFFIX}: {names}; others of the library work if they put features in place of placeholder tokens "
            "and call one language model with inputs_embeds="
        )


@dataclass(frozen=True)
class Host:
    """The parts of a model that a pruner works with.

    Args:
        model: the class with a head, on which `generate` is called.
        base: ``model.model`` or the model itself, which merges features into the prompt.
        language_model: what ``base`` calls with ``inputs_embeds=``, without a head.
        placeholders: token ids that stand for visual tokens, by modality, "image" and "video".
        visual_arguments: names of the arguments of ``forward`` that are about pictures.
        deep: whether the language model can get visual features in its layers, too.
    """

    model: nn.Module
    base: nn.Module
    language_model: nn.Module
    placeholders: dict[str, int]
    visual_arguments: frozenset[str]
    deep: bool

    @property
    def model_type(self) -> str:
        return self.model.config.model_type

    def visual_inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those arguments of a call that are about pictures."""
        return {
            name: value
            for name, value in arguments.items()
            if value is not None and (name in self.visual_arguments or name.startswith("pixel_values"))
        }

    def modalities(self, arguments: dict[str, Any]) -> set[str]:
        """Which of "image" and "video" a call brings."""
        names = [name for name in self.visual_inputs(arguments) if name.startswith(PICTURES)]
        return {"video" if name == "pixel_values_videos" else "image" for name in names}

    def shows_pictures(self, arguments: dict[str, Any]) -> bool:
        """Whether a call brings pictures or videos."""
        return bool(self.modalities(arguments)) or bool(arguments.get("mm_encoder_outputs"))


def find_host(model: nn.Module) -> Host:
    """The parts of a model. Raises UnsupportedModelError where it is not built to the pattern."""
    if is_wrapper(model):
        raise UnsupportedModelError(
            model._orig_mod,
            "it is wrapped by torch.compile, whose graph would go round the pruner: attach to the model inside, and "
            "compile the layers of its language model alone",
        )
    config = getattr(model, "config", None)
    if type(model).__module__.startswith("transformers_modules"):
        raise UnsupportedModelError(
            model, "its code came with the checkpoint (remote code); load it as a class of the library instead"
        )
    if config is None or not hasattr(model, "generate"):
        raise UnsupportedModelError(model, "it has no config or no generate(); attach to the inner Transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(model, "it is an encoder-decoder model")
    base, language_model = parts_of(model)
    if language_model is None:
        raise UnsupportedModelError(
            model,
            "it has no model.language_model or model.text_model (of a wrapper such as PEFT, take the inner model)",
        )
    taken = inspect.signature(type(language_model).forward).parameters
    beyond = deep_features(taken)
    if beyond:
        raise UnsupportedModelError(
            model,
            f"its language model takes {', '.join(beyond)} beside the embeddings, which would have to be pruned too",
        )
    if not hasattr(base, "get_image_features"):
        raise UnsupportedModelError(model, "its model has no get_image_features()")
    placeholders = {}
    for modality in ("image", "video"):
        names = (f"{modality}_token_id", f"{modality}_token_index")
        found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
        if found is not None:
            placeholders[modality] = found
    if "image" not in placeholders:
        raise UnsupportedModelError(model, "its config names no image_token_id")
    parameters = inspect.signature(type(model).forward).parameters.values()
    arguments = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD} - NOT_VISUAL
    if not any(name.startswith(PICTURES) for name in arguments):
        raise UnsupportedModelError(model, f"its forward takes none of {', '.join(PICTURES)}")
    return Host(model, base, language_model, placeholders, frozenset(arguments), bool(DEEP_FEATURES & set(taken)))


def parts_of(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """What merges features into the prompt, and the language model that it calls; ``None`` where there is none.

    The first is ``model.model``, or the model itself, whose language model has a head of its own then (Llama 4).
    """
    base = getattr(model, "model", None)
    for name in ("language_model", "text_model"):
        if hasattr(base, name):
            return base, getattr(base, name)
    inner = getattr(getattr(model, "language_model", None), "model", None)
    if hasattr(model, "get_image_features") and hasattr(inner, "layers"):
        return model, inner
    return base, None


def deep_features(names: Iterable[str]) -> list[str]:
    """Those arguments of a language model that bring visual features past its embeddings in an unknown form."""
    return sorted(name for name in set(names) - DEEP_FEATURES if any(word in name for word in VISUAL_WORDS))
