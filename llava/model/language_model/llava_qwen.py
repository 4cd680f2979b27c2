"""LLaVA-Video and LLaVA-OneVision: LLaVA on Qwen2."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.llava_arch import LlavaMetaModel


class LlavaQwenConfig(Qwen2Config):
    """Qwen2's configuration with LLaVA's ``mm_*`` keys."""

    model_type = "llava_qwen"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    """Qwen2's body with tower and projector."""

    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(LlavaCausalLM, Qwen2ForCausalLM):
    """LLaVA-Video and LLaVA-OneVision, for pictures and videos."""

    config_class = LlavaQwenConfig
    crops_are_views: ClassVar[bool] = True
    cut_to_tokenizer: ClassVar[bool] = True

    def __init__(self, config: LlavaQwenConfig) -> None:
        super(Qwen2ForCausalLM, self).__init__(config)  # not Qwen2's own: it would build a body without a tower
        self.model = LlavaQwenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("llava_qwen", LlavaQwenConfig)
AutoModelForCausalLM.register(LlavaQwenConfig, LlavaQwenForCausalLM)
