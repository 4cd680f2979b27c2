"""The configuration of LLaVA-OneVision 1.5, as its checkpoints write it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen3Config

LEFT_OUT = {  # the sizes of the 4B model
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
ROPE_THETA = 5e6


class RiceConfig(PretrainedConfig):
    """The vision tower.

    Args:
        depth, hidden_size, intermediate_size, num_heads, hidden_act, layer_norm_eps: of its blocks.
        patch_size, in_channels: of a patch.
        temporal_patch_size: frames in a patch; its patches have one.
        spatial_merge_size: patches along the side of the square that becomes one token.
        text_hidden_size: width of a token.
        initializer_range: of random weights.
    """

    model_type = "rice_vit"
    base_config_key = "vision_config"

    def __init__(
        self,
        depth: int = 24,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_heads: int = 16,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-5,
        patch_size: int = 14,
        in_channels: int = 3,
        temporal_patch_size: int = 1,
        spatial_merge_size: int = 2,
        text_hidden_size: int = 2560,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.depth = depth
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_heads = num_heads
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.temporal_patch_size = temporal_patch_size
        self.spatial_merge_size = spatial_merge_size
        self.text_hidden_size = text_hidden_size
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        if temporal_patch_size != 1:
            raise ValueError(f"RICE's patches have one frame, got temporal_patch_size={temporal_patch_size}")


class OneVision15TextConfig(Qwen3Config):
    """The language model: Qwen3's, and what a published configuration means by a field that it leaves out."""

    model_type = "LLaVAOneVision1_5_text"
    base_config_key = "text_config"

    def __init__(self, **kwargs: Any) -> None:
        theta = {} if kwargs.get("rope_parameters") else {"rope_theta": ROPE_THETA}
        super().__init__(**LEFT_OUT | theta | kwargs)


class OneVision15Config(PretrainedConfig):
    """Tower and language model.

    Args:
        vision_config, text_config: as mappings, or made already.
        image_token_id, video_token_id: placeholders of a token.
        vision_start_token_id: what stands before a picture.
    """

    model_type = "llavaonevision1_5"
    sub_configs = {"vision_config": RiceConfig, "text_config": OneVision15TextConfig}  # noqa: RUF012 (the library's)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict[str, Any] | RiceConfig | None = None,
        text_config: dict[str, Any] | OneVision15TextConfig | None = None,
        image_token_id: int = 151655,
        video_token_id: int = 151656,
        vision_start_token_id: int = 151652,
        **kwargs: Any,
    ) -> None:
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = RiceConfig(**(vision_config or {}))
        if text_config is None or isinstance(text_config, dict):
            text_config = OneVision15TextConfig(**(text_config or {}))
        if vision_config.text_hidden_size != text_config.hidden_size:
            raise ValueError(
                f"the tower gives tokens of width {vision_config.text_hidden_size} (text_hidden_size), the language "
                f"model takes {text_config.hidden_size}"
            )
        self.vision_config = vision_config
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.vision_start_token_id = vision_start_token_id
        super().__init__(**kwargs)
