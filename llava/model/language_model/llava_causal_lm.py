"""Reading pictures and answering about them, whatever the language model behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX
from llava.decoder.attachment import DecoderPruning, find_pruning, resumed_pruning
from llava.model.llava_arch import EmbeddedPrompts, LlavaMetaForCausalLM, LlavaMetaModel, Shown
from llava.pruning import Method


class LlavaCausalLM(LlavaMetaForCausalLM):
    """Base of all families, listed before the library's own class: `forward` and `generate` with pictures.

    Both take, beside the library's own arguments, ``images``, ``image_sizes``, ``pruner``, ``query``,
    ``sample_ids`` and ``modalities`` as described in `LlavaMetaForCausalLM.embed_prompts`.
    """

    # The tower is loaded apart (builder.py); old checkpoints carry rotary tables that the library computes itself.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^model\.vision_tower\.", r"rotary_emb\.inv_freq$"]

    def get_model(self) -> LlavaMetaModel:
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Shown | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        pruner: Method | None = None,
        query: str | Sequence[str] | None = None,
        sample_ids: Sequence[int] | None = None,
        modalities: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocabulary) over the spliced prompt, and the loss if ``labels`` (B, L) are given.

        With a method inside the decoder the logits are those of the positions that it leaves.
        """
        prompts = pruning = None
        if inputs_embeds is None and images is not None:
            prompts = self.embed_prompts(  # Script: pruner and query come in here
                input_ids,
                attention_mask,
                labels,
                images,
                image_sizes,
                pruner,
                query,
                sample_ids,
                modalities=modalities,
            )
            input_ids, inputs_embeds, labels = None, prompts.inputs_embeds, prompts.labels
            attention_mask, position_ids = prompts.attention_mask, prompts.position_ids
            pruning = prompts.decoder_pruning(self.model)
        with self._inside_decoder(
            pruning, kwargs.get("past_key_values")
        ):  # Script: methods inside the decoder act here
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels if pruning is None else None,
                **kwargs,
            )
        if pruning is not None and labels is not None:
            left = pruning.labels(labels, IGNORE_INDEX)
            output.loss = self.loss_function(logits=output.logits, labels=left, vocab_size=self.config.vocab_size)
        if pruning is not None and self.attached_pruner is not None:
            prompts.note_kept(pruning)
        return output

    def _inside_decoder(self, pruning: DecoderPruning | None, past_key_values: Any) -> AbstractContextManager:
        """The block in which a method acts: a new one, or one that decodes behind a prompt shortened before."""
        if pruning is not None:
            return pruning.attached()
        prompt = getattr(past_key_values, "decoder_pruning", None)
        resumes = prompt is not None and past_key_values.get_seq_length() > 0
        if not resumes or find_pruning(self.model) is not None:
            return nullcontext()
        return resumed_pruning(self.model, prompt)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | EmbeddedPrompts | None = None,
        images: Shown | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        pruner: Method | None = None,
        query: str | Sequence[str] | None = None,
        sample_ids: Sequence[int] | None = None,
        modalities: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Answer prompts; rows of different length are padded on the left whatever side they came in with.

        Args:
            inputs: (B, L) token ids with IMAGE_TOKEN_INDEX once per image (also as ``input_ids=``), or what
                `embed_prompts` made of them with the padding on the left: then ``kept`` in there says afterwards what
                a method inside the decoder has left.
            kwargs: the library's generation arguments; ``attention_mask`` (B, L) belongs to ``inputs``.

        Returns:
            (B, new) ids of the new tokens alone, or what the library's `generate` returns under its own options.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None:
            if "inputs_embeds" not in kwargs:
                raise ValueError("generate needs token ids (inputs) or inputs_embeds")
            return super().generate(**kwargs)
        kwargs.pop("position_ids", None)  # they count placeholders, not visual tokens
        prompts = inputs
        if not isinstance(prompts, EmbeddedPrompts):
            prompts = self.embed_prompts(  # Script: and here; the library then sees an ordinary, shorter prompt
                inputs,
                kwargs.pop("attention_mask", None),
                images=images,
                image_sizes=image_sizes,
                pruner=pruner,
                query=query,
                sample_ids=sample_ids,
                padding_side="left",
                modalities=modalities,
            )
        mask = prompts.attention_mask.long()
        pruning = prompts.decoder_pruning(self.model)
        with self._inside_decoder(pruning, None):  # Script: methods inside the decoder act here
            output = super().generate(inputs_embeds=prompts.inputs_embeds, attention_mask=mask, **kwargs)
        if pruning is not None:
            prompts.note_kept(pruning)
        return output
