"""LLaVA on Llama and Vicuna."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.llava_arch import LlavaMetaModel


class LlavaConfig(LlamaConfig):
    """Llama's configuration with LLaVA's ``mm_*`` keys; the library has taken the name "llava" for its own class."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama's body with tower and projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaCausalLM, LlamaForCausalLM):
    """LLaVA-1.5 and LLaVA-NeXT with a Llama-style language model."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # not Llama's own: it would build a body without a tower
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
