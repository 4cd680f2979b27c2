"""Stage 2: what relates the tower to text, trained as CLIP is. Resumes from its last whole state.

Pictures are told from pictures and captions from captions within a batch, by the class token of the last layer alone.
No patch is ever told what it means to a text, and the layers that LLaVA reads stay as they are: what a question's
similarity to a patch says about the patch comes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from files import write_with
from questions import article
from scenes import Layout, SceneObject
from stages import Schedule, Stage
from torch import Tensor, nn
from tower import descriptor_masks, joint_text, joint_vision, relevance_auc, vision_features
from tqdm import tqdm
from train_tower import make_queries
from transformers import CLIPModel, CLIPTokenizer
from views import Views, normalize


@dataclass(frozen=True)
class JointSettings(Schedule):
    """Everything the result depends on besides the features."""

    steps: int = 1600
    muon_rate: float = 3e-3
    adam_rate: float = 1e-3
    warmup: int = 50
    pairs: int = 192  # pictures, each with one caption, of a step


# ------------------------------------------------------------------------------------------- captions


def _named(thing: SceneObject, rng: np.random.Generator) -> str:
    """A thing as a caption names it: most often by both properties, else by one."""
    how = rng.random()
    noun = f"{thing.color} {thing.shape}" if how < 0.7 else thing.shape if how < 0.85 else f"{thing.color} object"
    return article(noun) + (f" that says {thing.text}" if thing.text and rng.random() < 0.7 else "")


_FRAMES = ("{}", "{}.", "a picture of {}", "there is {}", "{} on {behind}", "{} in front of {behind}")


def scene_caption(layout: Layout, seen: list[int], rng: np.random.Generator) -> str:
    """Two to five of the objects ``seen``, in any order: "a red star, a cup and a sign that says EXIT on sand"."""
    number = min(len(seen), int(rng.integers(2, 6)))
    names = [_named(layout.objects[k], rng) for k in rng.permutation(seen)[:number]]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "nothing"
    return _FRAMES[rng.integers(len(_FRAMES))].format(listed, behind=layout.background)


# ------------------------------------------------------------------------------------------- pictures


@dataclass
class SeenViews:
    """``features`` (N, 577, 128) float16 of the layer before the last, class token first, and the views themselves."""

    features: np.ndarray
    views: Views

    def visible(self, index: int) -> list[int]:
        """Objects of which a patch shows in view ``index``."""
        return [int(k) for k in np.unique(self.views.owners[index]) if k >= 0]


@torch.no_grad()
def seen_views(folder: Path, name: str, clip: CLIPModel, views: Views) -> SeenViews:
    """``views`` through the tower, stored in ``folder`` and read again at the next call."""
    path = folder / f"seen-{name}.npy"
    if not path.exists():
        rows = np.empty((len(views), 577, clip.config.vision_config.hidden_size), np.float16)
        for part in tqdm(np.array_split(np.arange(len(views)), -(-len(views) // 32)), f"seen {name}", mininterval=5):
            rows[part] = vision_features(clip, normalize(torch.from_numpy(views.pixels[part]))).half().numpy()
        write_with(path, lambda file: np.save(file, rows))
    return SeenViews(np.load(path, mmap_mode="r"), views)


# ---------------------------------------------------------------------------------------------- model


@torch.no_grad()
def renew_joint_side(clip: CLIPModel, seed: int) -> None:
    """Begin anew, as CLIP does: last vision layer and norm, both projections, text tower; freeze the rest."""
    torch.manual_seed(seed)
    fresh = CLIPModel(clip.config)
    clip.requires_grad_(False)
    for name in ("text_model", "visual_projection", "text_projection"):
        setattr(clip, name, getattr(fresh, name))
    clip.vision_model.encoder.layers[-1] = fresh.vision_model.encoder.layers[-1]
    clip.vision_model.post_layernorm = fresh.vision_model.post_layernorm
    clip.logit_scale = fresh.logit_scale


def class_output(clip: CLIPModel, features: Tensor) -> Tensor:
    """The class token after the last layer (B, 128) from the features before it (B, n, 128), class token first.

    One query looks at n tokens, so that keys and values need not be computed: q . (K x) = (K'q) . x, and the weighted
    mean of values is the value of the weighted mean. The part of a key that is the same for all drops out.
    """
    layer = clip.vision_model.encoder.layers[-1]
    attention, norm = layer.self_attn, layer.layer_norm1
    heads, width = attention.num_heads, features.shape[-1]
    plain = F.layer_norm(features, (width,), eps=norm.eps)  # before gain and bias
    query = attention.q_proj(plain[:, 0] * norm.weight + norm.bias) * attention.scale
    keys, values = (linear.weight.unflatten(0, (heads, -1)) for linear in (attention.k_proj, attention.v_proj))
    look = torch.einsum("bhd,hdc->bhc", query.unflatten(-1, (heads, -1)), keys) * norm.weight
    weights = torch.bmm(look, plain.mT).softmax(dim=-1)  # (B, heads, n)
    mean = torch.bmm(weights, plain) * norm.weight + norm.bias
    read = torch.einsum("bhc,hdc->bhd", mean, values).flatten(1) + attention.v_proj.bias
    hidden = features[:, 0] + attention.out_proj(read)
    return hidden + layer.mlp(layer.layer_norm2(hidden))


class JointTraining(nn.Module):
    """A tower whose joint side is trained."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def logits(self, features: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Pictures (B, n, 128) against captions (B of them): (B, B)."""
        pictures = joint_vision(self.clip, class_output(self.clip, features))
        return self.clip.logit_scale.exp().clamp(max=100) * pictures @ joint_text(self.clip, tokens).T

    def loss(self, features: Tensor, tokens: dict[str, Tensor]) -> tuple[Tensor, float]:
        """CLIP's: the mean of both directions' cross-entropy; and how often a picture finds its caption."""
        logits = self.logits(features, tokens)
        pairs = torch.arange(len(logits))
        found = (logits.argmax(-1) == pairs).float().mean().item()
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2, found


# ------------------------------------------------------------------------------------------- training


def _tokenize(tokenizer, texts: list[str]) -> dict[str, Tensor]:
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def draw_pairs(sets: list[SeenViews], number: int, rng: np.random.Generator, tokenizer) -> tuple[Tensor, dict]:
    """``number`` views, evenly from the sets, with a caption each: features (number, 577, 128) and tokens."""
    rows, captions = [], []
    for seen, share in zip(sets, np.array_split(np.arange(number), len(sets)), strict=True):
        for index in rng.choice(len(seen.views), len(share), replace=False):
            rows.append(seen.features[index])
            captions.append(scene_caption(seen.views.layouts[index], seen.visible(index), rng))
    return torch.from_numpy(np.stack(rows)).float(), _tokenize(tokenizer, captions)


@torch.no_grad()
def validate(model: JointTraining, held_out: list[SeenViews], tokenizer, number: int = 96) -> dict[str, float]:
    """On views that were not trained on: how often a picture finds its caption among ``number``, and how well the
    patches of what a question asks about are found in the joint space, by the layer that LLaVA reads (AUC).
    """
    rng = np.random.default_rng(1)
    _, found = model.loss(*draw_pairs(held_out, number, rng, tokenizer))
    areas = []
    for seen in held_out:
        chosen = np.flatnonzero(seen.views.padded)[:48]
        queries = make_queries(seen.views, chosen, 4, rng, tokenizer)
        patches = joint_vision(model.clip, torch.from_numpy(seen.features[chosen][:, 1:]).float())
        similarity = torch.einsum("qe,qne->qn", joint_text(model.clip, queries.tokens), patches[queries.views])
        asked, _ = descriptor_masks(torch.from_numpy(seen.views.labels[chosen]), queries.classes)
        areas.append(relevance_auc(similarity, asked[torch.arange(len(asked)), queries.views]))
    return {"found": found, "auc": torch.cat(areas).nanmean().item()}


def train_joint(
    work: Path, clip: CLIPModel, train: list[SeenViews], held_out: list[SeenViews], tokenizer_folder: Path, settings
) -> CLIPModel:
    """Train, or go on training, the joint side of ``clip``, which is changed."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    renew_joint_side(clip, settings.seed)
    model = JointTraining(clip)
    stage = Stage(work, "joint", model, settings)
    for step in stage.steps():
        rng = np.random.default_rng([settings.seed, step])
        loss, found = model.loss(*draw_pairs(train, settings.pairs, rng, tokenizer))
        stage.update(loss)
        if stage.is_due(step):
            row = {"found": found}
            if stage.is_due(step, every=2):
                row |= {f"val_{k}": v for k, v in validate(model, held_out, tokenizer).items()}
            stage.save(step, row)
    return clip.eval()
