"""CLIP's joint space: its text encoder and both projections, beside whatever model reads its patch features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedTokenizerBase,
)

from llava.checkpoint import CheckpointError, fill_module, read_json, read_tensors
from llava.relevance.text_side import TextSide

PROJECTION = "visual_projection.weight"
LAST_NORM = "vision_model.post_layernorm."


class ClipJointSpace(TextSide):
    """The space in which CLIP compares pictures and texts: its text encoder and both projections.

    No module of the model, so that checkpoints saved from it stay in their own format.

    Args:
        text_model: CLIP's text tower with its projection.
        visual_projection: (e, c) float32, CLIP's projection of the class token.
        last_norm: CLIP's layer norm before it.
    """

    relevance_sign = -1  # patches of the second-to-last layer are less similar to what they show (see script.py)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_model: CLIPTextModelWithProjection,
        visual_projection: Tensor,
        last_norm: nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_model = text_model.requires_grad_(False).eval()
        self.visual_projection = visual_projection  # (e, c) float32
        self.last_norm = last_norm.requires_grad_(False)
        self.max_length = text_model.config.max_position_embeddings

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device | str) -> ClipJointSpace:
        """From a CLIP folder. Raises CheckpointError where a file is missing; see `check_joint_space`."""
        check_joint_space(folder)
        with torch.device("meta"):
            text_model = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder))
        tensors = read_tensors(folder, ("text_model.", "text_projection.", PROJECTION, LAST_NORM))
        projection = tensors.pop(PROJECTION).float()
        norm = nn.LayerNorm(projection.shape[1], CLIPVisionConfig.from_pretrained(folder).layer_norm_eps)
        norm.load_state_dict({name: tensors.pop(LAST_NORM + name) for name in ("weight", "bias")})
        fill_module(text_model, tensors, folder, dtype)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        return cls(tokenizer, text_model.to(device), projection.to(device), norm.to(device))

    def image_embeds(self, features: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """Patches (V, n, c) -> joint space (V, n, e) float32, by CLIP's last norm and projection, patch by patch.

        Args:
            norm: a tower's own last norm; ``None`` takes that of the CLIP folder.
        """
        norm = self.last_norm if norm is None else norm
        weight, bias = (parameter.float().to(features.device) for parameter in (norm.weight, norm.bias))
        features = F.layer_norm(features.float(), norm.normalized_shape, weight, bias, norm.eps)
        return F.linear(features, self.visual_projection.to(features.device))

    def segments(self, text: str) -> list[list[int]]:
        """Token ids of a text, cut into pieces that fit the encoder, each with its own start and end token."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        room = self.max_length - 2
        pieces = [ids[start : start + room] for start in range(0, max(len(ids), 1), room)]
        return [[self.tokenizer.bos_token_id, *piece, self.tokenizer.eos_token_id] for piece in pieces]

    def embed_segments(self, segments: list[list[int]]) -> Tensor:
        rows = self.tokenizer.pad({"input_ids": segments}, return_tensors="pt")
        rows = {name: value.to(self.text_model.device, non_blocking=True) for name, value in rows.items()}
        return self.text_model(**rows).text_embeds


def check_joint_space(folder: Path) -> None:
    """Raise CheckpointError unless ``folder`` holds CLIP's tokenizer and text weights; lists what is missing."""
    has = {name: (folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")}
    missing = []
    if not has["tokenizer.json"] and not (has["vocab.json"] and has["merges.txt"]):
        missing.append("tokenizer.json (or vocab.json and merges.txt)")
    if "text_config" not in read_json(folder / "config.json"):
        missing.append("text_config in config.json")
    try:
        found = read_tensors(folder, ("text_projection.", PROJECTION))
        missing += [f"weights {name}" for name in ("text_projection.weight", PROJECTION) if name not in found]
    except CheckpointError as error:
        missing.append(str(error))
    if missing:
        raise CheckpointError(
            f"relevance=clip needs CLIP's text tower, but {folder} lacks: {'; '.join(missing)}. "
            f"relevance=language needs no text tower"
        )
