"""Qwen3.5 and its mixture of experts: recurrent layers read the kept tokens alone, in their order; attention layers
know their places as well. Pruning is before the language model, so both kinds see the same sequence."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.integrations.vllm.placed import PlacedProcessingInfo
from llava.integrations.vllm.qwen3_vl import FramesApart, ScriptQwen3VLProcessor


class ScriptQwen3_5ProcessingInfo(PlacedProcessingInfo, Qwen3_5ProcessingInfo):
    pass


class ScriptQwen3_5MoeProcessingInfo(PlacedProcessingInfo, Qwen3_5MoeProcessingInfo):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    ScriptQwen3VLProcessor, info=ScriptQwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class ScriptQwen3_5ForConditionalGeneration(FramesApart, Qwen3_5ForConditionalGeneration):
    """vLLM's Qwen3.5 that gives some of the visual tokens of a picture or frame."""

    script_info = ScriptQwen3_5ProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(
    ScriptQwen3VLProcessor, info=ScriptQwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class ScriptQwen3_5MoeForConditionalGeneration(FramesApart, Qwen3_5MoeForConditionalGeneration):
    """The same with a mixture of experts."""

    script_info = ScriptQwen3_5MoeProcessingInfo
