"""RICE, the vision tower of LLaVA-OneVision 1.5: pictures of any size, a class token for each frame, 2 x 2 patches a
token.

Paper: "Region-based Cluster Discrimination for Visual Representation Learning" (arXiv 2507.20025); the tower as it is
used: "LLaVA-OneVision-1.5" (arXiv 2509.23661). Modules are called as in the published weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from llava.integrations.onevision_1_5.configuration import RiceConfig

ROTARY_BASE = 10000.0

Rotation = tuple[Tensor, Tensor]  # cosines and sines, (s, head width) float32


class PatchEmbedding(nn.Module):
    """Flat patches (s, channels x p x p) -> (s, e)."""

    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.shape = (config.in_channels, side, side)
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=side, stride=side, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        squares = patches.unflatten(-1, self.shape).to(self.proj.weight.dtype)
        return self.proj(squares).flatten(1)


class Attention(nn.Module):
    """Attention within each frame, with rotary positions."""

    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotation: Rotation, lengths: Sequence[int]) -> Tensor:
        """(s, e) -> (s, e); ``lengths`` of the frames add up to s."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (s, heads, e / heads)
        query, key = rotated(query, rotation), rotated(key, rotation)
        frames = zip(*(part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)), strict=True)
        read = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in frames]
        return self.proj(torch.cat(read, dim=1).transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotation: Rotation, lengths: Sequence[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation, lengths)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Patches side by side in squares (s, e) -> tokens of the language model (s / merge^2, d)."""

    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.text_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(-1, self.width))


class RiceTower(nn.Module):
    """Patches of all pictures in one row, square after square, and the grid of each -> visual tokens."""

    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.merge = config.spatial_merge_size
        self.head_width = config.hidden_size // config.num_heads
        self.patch_embed = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.class_pos_emb = nn.Parameter(torch.zeros(1, self.head_width // 2))
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Tokens of all pictures (sum of t h w / merge^2, d).

        Args:
            patches: (sum of t h w, channels x p x p), merge x merge neighbours one after the other.
            grids: (pictures, 3) int64, t frames of h x w patches.

        Raises:
            ValueError: the grids do not count the patches, or do not fall into squares.
        """
        counted = int(grids.prod(-1).sum())
        if counted != len(patches):
            raise ValueError(f"{len(patches)} patches, and grids of {counted}")
        if bool((grids[:, 1:] % self.merge).any()):
            raise ValueError(f"grids of h x w patches must be multiples of {self.merge}, got {grids.tolist()}")
        frames = (grids[:, 1] * grids[:, 2]).repeat_interleave(grids[:, 0]).tolist()
        angles = torch.cat([self.angles(*grid) for grid in grids.tolist()]).split(frames)
        of_class = self.class_pos_emb.float()
        turn = torch.cat([torch.cat([of_class, own]) for own in angles])
        turn = torch.cat([turn, turn], dim=-1)
        rotation = turn.cos(), turn.sin()
        lengths = [1 + frame for frame in frames]
        embedded = self.patch_embed(patches).split(frames)
        x = torch.cat([torch.cat([self.class_embedding[None].to(own), own]) for own in embedded])
        x = self.pre_layernorm(x)
        for block in self.blocks:
            x = block(x, rotation, lengths)
        return self.merger(torch.cat([own[1:] for own in x.split(lengths)]))

    def angles(self, frames: int, height: int, width: int) -> Tensor:
        """(frames x height x width, head width / 2) float32: half of it for each patch's row, half for its column."""
        device = self.class_pos_emb.device
        quarter = torch.arange(0, self.head_width // 2, 2, dtype=torch.float32, device=device)
        frequencies = ROTARY_BASE ** (-quarter / (self.head_width // 2))
        rows, columns = (torch.arange(size, device=device) for size in (height, width))
        places = torch.cartesian_prod(rows, columns).view(height, width, 2)
        squares = places.unflatten(0, (-1, self.merge)).unflatten(2, (-1, self.merge)).transpose(1, 2)
        return (squares.reshape(-1, 2, 1) * frequencies).flatten(1).repeat(frames, 1)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys (s, heads, w), turned in the planes of the channels i and i + w / 2, in float32."""
    cosine, sine = (part[:, None] for part in rotation)
    first, second = x.float().chunk(2, dim=-1)
    return (torch.cat([first, second], dim=-1) * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)
