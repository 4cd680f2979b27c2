"""LLaVA-NeXT on Mistral (llava-v1.6-mistral-7b)."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.llava_arch import LlavaMetaModel


class LlavaMistralConfig(MistralConfig):
    """Mistral's configuration with LLaVA's ``mm_*`` keys."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral's body with tower and projector."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaCausalLM, MistralForCausalLM):
    """LLaVA-NeXT with Mistral as its language model."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig) -> None:
        super(MistralForCausalLM, self).__init__(config)  # not Mistral's own: it would build a body without a tower
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("llava_mistral", LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
