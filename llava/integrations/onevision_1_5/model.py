"""LLaVA-OneVision 1.5: RICE before Qwen3. Tokens of pictures count on in the prompt as text does (no mRoPE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, Qwen3Model
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)

from llava.integrations.onevision_1_5.configuration import OneVision15Config
from llava.integrations.onevision_1_5.rice import RiceTower

PUBLISHED_NAMES = {  # of tensors, and what they are called here; published weights are in either form
    r"^visual\.": "model.visual.",
    r"^model\.(?!language_model\.|visual\.)": "model.language_model.",
}
PICTURES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class OneVision15PreTrainedModel(PreTrainedModel):
    config_class = OneVision15Config
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    _no_split_modules = ["Qwen3DecoderLayer", "Block"]  # noqa: RUF012 (the library's)
    _skip_keys_device_placement = "past_key_values"
    _supports_flash_attn = True  # of the language model; the tower takes torch's own attention
    _supports_sdpa = True


class OneVision15Model(OneVision15PreTrainedModel):
    """Tower and language model without a head."""

    def __init__(self, config: OneVision15Config) -> None:
        super().__init__(config)
        self.visual = RiceTower(config.vision_config)
        self.language_model = Qwen3Model._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> BaseModelOutputWithPooling:
        """Tokens of each picture, (t h w / merge^2, d) each, as ``pooler_output``.

        Args:
            pixel_values: (patches of all pictures, channels x p x p).
            image_grid_thw: (pictures, 3) int64, frames, rows and columns of patches.
        """
        tokens = self.visual(pixel_values, image_grid_thw)
        counts = (image_grid_thw.prod(-1) // self.visual.merge**2).tolist()
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.split(counts))

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor) -> BaseModelOutputWithPooling:
        """As `get_image_features`; the frames of a video one after the other."""
        return self.get_image_features(pixel_values_videos, video_grid_thw)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The language model on a prompt (B, L) with features in place of placeholder tokens.

        Args:
            mm_token_type_ids, second_per_grid_ts: written by the processor, Qwen2.5-VL's, for positions with several
                axes, which this model does not have.

        Raises:
            ValueError: pictures without ids, without grids, or with another number of tokens than placeholders.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        shown = (
            ("image", pixel_values, image_grid_thw, self.get_image_features),
            ("video", pixel_values_videos, video_grid_thw, self.get_video_features),
        )
        for modality, pixels, grids, compute in shown:
            if pixels is None:
                continue
            if input_ids is None or grids is None:
                raise ValueError(f"{modality}s need input_ids with placeholders and {modality}_grid_thw")
            tokens = torch.cat(compute(pixels, grids).pooler_output).to(inputs_embeds)
            places = input_ids == getattr(self.config, f"{modality}_token_id")
            if int(places.sum()) != len(tokens):
                raise ValueError(f"{int(places.sum())} {modality} placeholders for {len(tokens)} tokens")
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], tokens)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class LLaVAOneVision1_5_ForConditionalGeneration(OneVision15PreTrainedModel, GenerationMixin):
    """The class that ``architectures`` names in published configurations."""

    def __init__(self, config: OneVision15Config) -> None:
        super().__init__(config)
        self.model = OneVision15Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *positional: Any, **named: Any) -> Any:
        """Weights under their published names; see the library's own."""
        return super().from_pretrained(*positional, **{"key_mapping": PUBLISHED_NAMES} | named)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Any = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, vocabulary), of the last ``logits_to_keep`` tokens where that is given, and the loss."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *positional: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The library's own; pictures are shown in the first step, or in each if there is no cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *positional, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and inputs.get("past_key_values") is not None:
            for pixels, _ in PICTURES.values():
                inputs[pixels] = None
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **named: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Rows (B, L) as often as beams ask for; the pictures of a row stay together."""
        shown = {name: named.pop(name) for pair in PICTURES.values() for name in pair if named.get(name) is not None}
        if expand_size > 1:
            for modality, (pixels, grids) in PICTURES.items():
                if pixels in shown:
                    placeholders = (input_ids == getattr(self.config, f"{modality}_token_id")).sum(-1)
                    shown[pixels], shown[grids] = repeated_pictures(
                        shown[pixels], shown[grids], placeholders * self.model.visual.merge**2, expand_size
                    )
        ids, arguments = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **named)
        return ids, arguments | shown


def repeated_pictures(pixels: Tensor, grids: Tensor, of_rows: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Patches and grids with the pictures of each row ``times`` one after the other.

    Args:
        pixels: (patches, c), picture after picture, in the order of the rows.
        grids: (pictures, 3) int64.
        of_rows: (B,) patches that each row shows.
    """
    sizes = grids.prod(-1)
    owners = torch.searchsorted(of_rows.cumsum(0), sizes.cumsum(0)).tolist()
    rows = [[number for number, owner in enumerate(owners) if owner == row] for row in range(len(of_rows))]
    order = [number for row in rows for number in row * times]
    parts = pixels.split(sizes.tolist())
    return torch.cat([parts[number] for number in order]), grids[order]
