"""SigLIP's joint space: its text tower and pooling head, beside whatever model reads its patch features.

SigLIP compares texts with the output of its attention-pooling head; there is no projection after it. A patch has no
embedding by definition, because the head pools all of them. The natural one is the head applied to that patch alone:
with a single key the attention weight is 1 whatever the probe says, so that

    a_i = W_o (W_v x_i + b_v) + b_o        e_i = a_i + MLP(LN(a_i))

where x_i leaves the last encoder layer and the norm after it. It is what SigLIP would say of a picture that consists
of this patch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipTextConfig, SiglipTextModel, SiglipTokenizer, SiglipVisionConfig, SiglipVisionModel

from llava.checkpoint import CheckpointError, fill_module, read_json, read_tensors
from llava.relevance.text_side import TextSide

TEXT_PREFIX, VISION_PREFIX = "text_model.", "vision_model."


class SiglipJointSpace(TextSide):
    """The space in which SigLIP compares pictures and texts: text tower, last vision layer and pooling head.

    LLaVA's checkpoints hold none of the three, so they come from a folder of the full SigLIP.

    Raises:
        CheckpointError: a file that it needs is missing; see `check_siglip_folder`.
    """

    relevance_sign = 1  # CLIP's reversed sign rests on its class token, which SigLIP lacks; not verified on pictures

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        check_siglip_folder(folder)
        self.folder = folder
        self.tokenizer = SiglipTokenizer.from_pretrained(folder)
        config = SiglipTextConfig.from_pretrained(folder)
        self.max_length = config.max_position_embeddings
        with torch.device("meta"):
            text_model = SiglipTextModel(config)
        self.text_model = _filled(text_model, _read(folder, TEXT_PREFIX), folder, dtype, device)

        self.vision_config = SiglipVisionConfig.from_pretrained(folder)
        last = f"encoder.layers.{self.vision_config.num_hidden_layers - 1}."
        tensors = _read(folder, *(VISION_PREFIX + part for part in (last, "post_layernorm.", "head.")))
        vision = _on_meta(self.vision_config, layers=1)
        del vision.embeddings  # what enters is the output of a tower
        tensors = {name.replace(last, "encoder.layers.0."): tensor for name, tensor in tensors.items()}
        self.last_layer_and_head = _filled(vision, tensors, folder, dtype, device)
        self._full_tower: SiglipVisionModel | None = None

    # --- pictures --------------------------------------------------------------------------------------------------

    def image_embeds(self, features: Tensor) -> Tensor:
        """Patches (V, n, c) as they leave the last layer but one, which LLaVA reads -> (V, n, e) float32.

        The "bridge" from a LLaVA tower, whose last layer was removed: SigLIP's own last layer, norm and head follow.
        """
        return self.token_embeds(self.last_hidden(features))

    def image_embeds_of_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (V, 3, s, s) -> (V, n, e) float32 by the untouched SigLIP, all layers: a tower pass of its own.

        The "full" source: exact by definition, against which the bridge from a fine-tuned tower can be checked.
        """
        tower = self.full_tower()
        pixels = pixels.to(tower.post_layernorm.weight.device, tower.post_layernorm.weight.dtype)
        with torch.no_grad():
            return self.token_embeds(tower(pixels).last_hidden_state)

    def last_hidden(self, features: Tensor) -> Tensor:
        """x (V, n, c): the last encoder layer and the norm after it, on the output of the layer before."""
        vision = self.last_layer_and_head
        weight = vision.post_layernorm.weight
        with torch.no_grad():
            hidden = vision.encoder.layers[0](features.to(weight.device, weight.dtype), None)
            return vision.post_layernorm(hidden)

    def token_embeds(self, hidden: Tensor) -> Tensor:
        """e (V, n, e) float32: the pooling head applied to each of the tokens x (V, n, c) alone."""
        head = self.last_layer_and_head.head
        width = hidden.shape[-1]
        attention = head.attention
        with torch.no_grad():
            value = F.linear(hidden, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
            pooled = attention.out_proj(value)
            return (pooled + head.mlp(head.layernorm(pooled))).float()

    def probe_attention(self, hidden: Tensor) -> Tensor:
        """Attention of the head's probe to the tokens x (V, n, c): (V, heads, n) float32, what a class token's is."""
        head = self.last_layer_and_head.head
        query_key, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
        width, heads = hidden.shape[-1], head.attention.num_heads
        with torch.no_grad():
            query = F.linear(head.probe, query_key[:width], bias[:width]).float()  # (1, 1, c)
            key = F.linear(hidden, query_key[width : 2 * width], bias[width : 2 * width]).float()
            query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
            return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0]

    def full_tower(self) -> SiglipVisionModel:
        """All of SigLIP's own vision layers, loaded when first asked for; without the head."""
        if self._full_tower is None:
            weight = self.last_layer_and_head.post_layernorm.weight
            tower = _on_meta(self.vision_config)
            tower.head, tower.use_head = nn.Identity(), False
            self._full_tower = _filled(
                tower, _read(self.folder, VISION_PREFIX), self.folder, weight.dtype, weight.device
            )
        return self._full_tower

    # --- texts -----------------------------------------------------------------------------------------------------

    def segments(self, text: str) -> list[list[int]]:
        """Token ids of a text, cut into pieces that fit the text tower, each ended and padded to its full length.

        Lower case and without punctuation, as SigLIP was trained; padding repeats the end token and is attended to.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        room = self.max_length - 1
        pieces = [ids[start : start + room] for start in range(0, max(len(ids), 1), room)]
        return [piece + [self.tokenizer.eos_token_id] * (self.max_length - len(piece)) for piece in pieces]

    def embed_segments(self, segments: list[list[int]]) -> Tensor:
        rows = torch.tensor(segments, device=self.text_model.device)
        return self.text_model(rows).pooler_output


def _on_meta(config: SiglipVisionConfig, layers: int | None = None) -> SiglipVisionModel:
    """A vision model without weights; of so many layers, where given."""
    config = SiglipVisionConfig.from_dict(config.to_dict())
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        return SiglipVisionModel(config)


def _read(folder: Path, *prefixes: str) -> dict[str, Tensor]:
    """Tensors of SigLIP's text or vision half, named as inside it."""
    return {name.partition(".")[2]: tensor for name, tensor in read_tensors(folder, prefixes).items()}


def _filled(
    model: nn.Module, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    fill_module(model, tensors, folder, dtype)
    return model.to(device).requires_grad_(False).eval()


def check_siglip_folder(folder: Path) -> None:
    """Raise CheckpointError unless ``folder`` holds the full SigLIP: its tokenizer, text tower and pooling head."""
    missing = [name for name in ("spiece.model",) if not (folder / name).is_file()]
    config = read_json(folder / "config.json")
    missing += [f"{name} in config.json" for name in ("text_config", "vision_config") if name not in config]
    try:
        wanted = (TEXT_PREFIX + "head.weight", VISION_PREFIX + "head.probe")
        found = read_tensors(folder, wanted)
        missing += [f"weights {name}" for name in wanted if name not in found]
    except CheckpointError as error:
        missing.append(str(error))
    if missing:
        raise CheckpointError(
            f"relevance=clip needs the full SigLIP (text tower and pooling head), but {folder} lacks: "
            f"{'; '.join(missing)}. relevance=language needs neither"
        )
