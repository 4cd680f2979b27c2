"""Stage 1: the tiny CLIP. Resumes from its last whole state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from formats import MAKERS, as_asked
from questions import Descriptor, draw
from stages import Schedule, Stage
from torch import Tensor, nn
from tower import (
    PatchHeads,
    Queries,
    contrastive_loss,
    descriptor_masks,
    joint_text,
    joint_vision,
    new_clip,
    patch_loss,
    relevance_auc,
    vision_features,
    whiten_patches,
)
from transformers import CLIPTokenizer
from views import Views, descriptor_classes, normalize

NO_DESCRIPTOR = (-2, -2, -2)


@dataclass(frozen=True)
class TowerSettings(Schedule):
    """Everything the result depends on besides the data."""

    steps: int = 1500
    muon_rate: float = 1e-2
    adam_rate: float = 1.5e-3
    warmup: int = 50
    batch: int = 16
    queries: int = 8  # per view


def make_queries(views: Views, chosen: np.ndarray, per_view: int, rng: np.random.Generator, tokenizer) -> Queries:
    """Questions, worded as the pruner gets them, and a few plain captions, about each chosen view. None finds its
    patches by what is written there.
    """
    texts, classes, owners = [], [], []
    for row, index in enumerate(chosen):
        layout = views.layouts[index]
        for _ in range(per_view):
            question = draw(layout, rng, MAKERS)
            while not question.asked or any(asked.text for asked in question.asked):
                question = draw(layout, rng, MAKERS)
            text, asked = as_asked(question, layout, rng)[0], question.asked
            if rng.random() < 0.2:
                thing = layout.objects[rng.integers(len(layout.objects))]
                asked = (Descriptor(thing.shape, thing.color),)
                text = f"a {thing.color} {thing.shape}"
            texts.append(text)
            rows = [descriptor_classes(d) for d in asked]
            classes.append((rows + [NO_DESCRIPTOR])[:2])
            owners.append(row)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    tokens = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    return Queries(tokens, torch.tensor(classes), torch.tensor(owners))


class TowerTraining(nn.Module):
    """The tower, its training heads and the offset of the presence decision."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.clip = new_clip(vocabulary)
        self.heads = PatchHeads()
        self.bias = nn.Parameter(torch.tensor(0.3))

    def losses(self, pixels: Tensor, labels: Tensor, queries: Queries) -> tuple[Tensor, dict[str, float]]:
        features = vision_features(self.clip, pixels)
        normed = self.clip.vision_model.post_layernorm(features)
        patches, texts = joint_vision(self.clip, features), joint_text(self.clip, queries.tokens)
        patch, seen = patch_loss(self.heads, normed[:, 1:], labels)
        scale = self.clip.logit_scale.exp().clamp(max=20)
        find, tell, whole = contrastive_loss(scale, self.bias, patches[:, 1:], patches[:, 0], texts, queries, labels)
        total = patch + 0.5 * find + tell + 0.2 * whole
        parts = {"patch": patch, "find": find, "tell": tell, "whole": whole}
        return total, {**{name: value.item() for name, value in parts.items()}, **seen}


@torch.no_grad()
def validate(model: TowerTraining, views: Views, tokenizer, number: int = 96) -> dict[str, float]:
    """Read-out accuracies and relevance AUC on padded views that were not trained on."""
    chosen = np.flatnonzero(views.padded)[:number]
    rng = np.random.default_rng(1)
    rows, areas = [], []
    for part in np.array_split(chosen, max(1, len(chosen) // 16)):
        pixels, labels = normalize(torch.from_numpy(views.pixels[part])), torch.from_numpy(views.labels[part])
        queries = make_queries(views, part, 6, rng, tokenizer)
        rows.append(model.losses(pixels, labels, queries)[1])
        patches = joint_vision(model.clip, vision_features(model.clip, pixels))
        similarity = torch.einsum("qe,qne->qn", joint_text(model.clip, queries.tokens), patches[queries.views, 1:])
        asked, _ = descriptor_masks(labels, queries.classes)
        areas.append(relevance_auc(similarity, asked[torch.arange(len(asked)), queries.views]))
    mean = {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
    return {**mean, "auc": torch.cat(areas).nanmean().item()}


def train_tower(
    work: Path, train: list[Views], held_out: list[Views], tokenizer_folder: Path, settings: TowerSettings
) -> TowerTraining:
    """Train, or go on training, and return the tower with its heads; a batch is drawn evenly from the sets."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(settings.seed)
    model = TowerTraining(len(tokenizer))
    few = [slice(0, min(len(views), 150)) for views in train]
    pixels, labels = (
        torch.from_numpy(np.concatenate([getattr(views, name)[part] for views, part in zip(train, few, strict=True)]))
        for name in ("pixels", "labels")
    )
    whiten_patches(model.clip, normalize(pixels), labels)
    stage = Stage(work, "tower", model, settings)
    for step in stage.steps():
        rng = np.random.default_rng([settings.seed, step])
        total = None
        for views in train:
            chosen = np.sort(rng.choice(len(views), settings.batch // len(train), replace=False))
            queries = make_queries(views, chosen, settings.queries, rng, tokenizer)
            pixels, labels = normalize(torch.from_numpy(views.pixels[chosen])), torch.from_numpy(views.labels[chosen])
            loss, parts = model.losses(pixels, labels, queries)
            total = loss if total is None else total + loss
        stage.update(total / len(train))
        if stage.is_due(step):
            if stage.is_due(step, every=3):
                for name, views in zip(("val", "crowded"), held_out, strict=True):
                    parts |= {f"{name}_{key}": value for key, value in validate(model, views, tokenizer).items()}
            stage.save(step, parts)
    return model.eval()
