"""Stages 3 and 4: projector and language model on the trained tower's features, first captions, then questions.

Everything goes through the ordinary ``forward`` of ``llava.model`` with labels; only the pictures are encoded before.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from conversations import Talk, choose_patches, draw_questions, make_caption, make_checklist, make_talk, pad_batch
from files import write_with
from formats import FIRST_MAKERS, MAKERS
from scenes import Layout
from stages import Schedule, Stage
from torch import Tensor, nn
from tower import vision_features
from tqdm import tqdm
from views import Views, normalize

from llava.constants import IGNORE_INDEX
from llava.layout.views import flat_layout
from llava.model.encoded_images import EncodedImages
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM


@dataclass(frozen=True)
class Budget:
    """One way to show pictures: ``tokens`` per view (``None`` = all), how often, and how much fits in a step."""

    tokens: int | None
    share: float
    pictures: int
    turns: int = 1


@dataclass(frozen=True)
class LanguageSettings(Schedule):
    """Everything the result depends on besides the features. ``first`` steps ask about single things only."""

    first: int = 0
    budgets: tuple[Budget, ...] = ()

    def draw(self, rng: np.random.Generator) -> Budget:
        shares = np.array([budget.share for budget in self.budgets])
        return self.budgets[rng.choice(len(shares), p=shares / shares.sum())]


# A caption asks for an attribute at every other word, right behind the word that it belongs to: within 200 steps the
# model looks things up. Questions alone, one answer in forty tokens, brought it to 47 % of attributes in 2,000 steps.
CAPTIONS = LanguageSettings(
    steps=1200,
    muon_rate=4e-3,
    adam_rate=3e-3,
    warmup=20,
    budgets=(Budget(8, 0.3, 32), Budget(16, 0.3, 32), Budget(32, 0.25, 32), Budget(64, 0.15, 24)),
)
QUESTIONS = LanguageSettings(
    steps=1600,
    muon_rate=3e-3,
    adam_rate=2e-3,
    warmup=30,
    first=700,
    budgets=(
        Budget(16, 0.25, 24, 5),
        Budget(32, 0.25, 20, 7),
        Budget(64, 0.20, 16, 8),
        Budget(128, 0.12, 12, 8),
        Budget(192, 0.08, 10, 8),
        Budget(None, 0.10, 5, 10),
    ),
)


class Pictures(Protocol):
    """Encoded pictures to train on."""

    layouts: list[Layout]

    def encode(
        self,
        model: LlavaLlamaForCausalLM,
        chosen: np.ndarray,
        asked: list[list[int]],
        tokens: int | None,
        rng: np.random.Generator,
        favour: bool = True,
    ) -> EncodedImages:
        """Pictures ``chosen``, each with ``tokens`` patches per view; ``asked`` are the objects its talk is about."""


@dataclass
class PaddedPictures:
    """LLaVA-1.5's: one view each. ``features`` (N, 576, 128) float16, ``owners`` (N, 576)."""

    features: np.ndarray
    owners: np.ndarray
    layouts: list[Layout]

    def encode(self, model, chosen, asked, tokens, rng, favour=True) -> EncodedImages:
        picks = [
            pick(self.owners[picture], targets, tokens, rng, favour)
            for picture, targets in zip(chosen, asked, strict=True)
        ]
        return self.show(model, chosen, picks)

    def show(self, model: LlavaLlamaForCausalLM, chosen: np.ndarray, picks: list[np.ndarray]) -> EncodedImages:
        """Pictures ``chosen``, each with the patches picked from it, equally many."""
        rows = [self.features[picture][patches] for picture, patches in zip(chosen, picks, strict=True)]
        features = torch.from_numpy(np.stack(rows)).float()
        layouts = [flat_layout(1, features.shape[1])] * len(chosen)
        return EncodedImages(model.get_model().mm_projector(features), features, layouts, layouts)


def pick(
    owner: np.ndarray, targets: list[int], tokens: int | None, rng: np.random.Generator, favour: bool
) -> np.ndarray:
    """Patches of one view: all, a random subset that favours objects, or one that favours nothing."""
    if tokens is None or tokens >= owner.size:
        return np.arange(owner.size)
    if favour:
        return choose_patches(owner, targets, tokens, rng)
    return np.sort(rng.choice(owner.size, tokens, replace=False))


@torch.no_grad()
def padded_pictures(folder: Path, name: str, clip, views: Views) -> PaddedPictures:
    """Features of the padded ones among ``views``, stored in ``folder`` and read again at the next call."""
    path = folder / f"features-{name}.npy"
    chosen = np.flatnonzero(views.padded)
    if not path.exists():
        rows = []
        for part in tqdm(np.array_split(chosen, max(1, len(chosen) // 32)), desc=f"features {name}", mininterval=5):
            features = vision_features(clip, normalize(torch.from_numpy(views.pixels[part])))
            rows.append(features[:, 1:].half().numpy())
        write_with(path, lambda file: np.save(file, np.concatenate(rows)))
    return PaddedPictures(np.load(path, mmap_mode="r"), views.owners[chosen], [views.layouts[k] for k in chosen])


def new_language_model(config: dict, seed: int) -> LlavaLlamaForCausalLM:
    """An untrained toy."""
    torch.manual_seed(seed)
    model = LlavaLlamaForCausalLM(LlavaConfig.from_dict(config))
    if hasattr(model.get_model(), "image_newline"):
        nn.init.normal_(model.get_model().image_newline, std=0.02)
    return model


def align_projector(
    model: LlavaLlamaForCausalLM, tokenizer, pictures: PaddedPictures, steps: int = 120, seed: int = 0
) -> None:
    """Stage 3, first half: patches of an object become the sum of the words for its shape, colour and text.

    Attention begins with keys equal to queries, so that it looks for like tokens, and with outputs that undo its
    values, so that it copies what it finds; the output head begins as the unit word embeddings, so that what is copied
    is said. A word then finds its patches from the first step on.
    """
    body = model.get_model()
    words = body.embed_tokens.weight
    with torch.no_grad():
        nn.init.normal_(words, std=3 / words.shape[1] ** 0.5)
        model.lm_head.weight.copy_(words / words.norm(dim=-1, keepdim=True))
        for layer in body.layers:
            nn.init.normal_(layer.self_attn.q_proj.weight, std=0.06)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
            nn.init.normal_(layer.self_attn.v_proj.weight, std=0.05)
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(body.mm_projector.parameters(), lr=3e-3)
    space = set(tokenizer("2", add_special_tokens=False).input_ids[:-1])  # what precedes a number's digits
    for _ in tqdm(range(steps), desc="projector", mininterval=5):
        rows, targets = [], []
        for picture in rng.choice(len(pictures.layouts), 64, replace=False):
            owner = pictures.owners[picture]
            patches = np.flatnonzero(owner >= 0)
            for patch in rng.choice(patches, min(24, len(patches)), replace=False):
                thing = pictures.layouts[picture].objects[owner[patch]]
                named = " ".join(filter(None, (thing.shape, thing.color, thing.text)))
                ids = [i for i in tokenizer(named, add_special_tokens=False).input_ids if i not in space]
                rows.append(pictures.features[picture][patch])
                targets.append(words[ids].sum(0))
        projected = body.mm_projector(torch.from_numpy(np.stack(rows)).float())
        loss = (projected - torch.stack(targets).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def talk_batch(
    pictures: Pictures, chosen: np.ndarray, turns: int, rng: np.random.Generator, tokenizer, makers=MAKERS
) -> tuple[list[Talk], list[list[int]]]:
    """A talk about every chosen picture and the objects it asks about."""
    talks, asked = [], []
    for picture in chosen:
        layout = pictures.layouts[picture]
        questions = draw_questions(layout, rng, turns, makers)
        talks.append(make_talk(layout, questions, rng, tokenizer))
        asked.append(sorted({target for question in questions for target in question.targets(layout)}))
    return talks, asked


def train_captions(
    work: Path, model: LlavaLlamaForCausalLM, tokenizer, train: PaddedPictures, settings: LanguageSettings
) -> None:
    """Stage 3, second half: train, or go on training, all of ``model`` but its tower to name what it is shown, and at
    every other step to tell what is there from what is not.
    """
    stage = Stage(work, "captions", model, settings)
    kinds = (("checklists", make_checklist), ("captions", make_caption))
    losses: defaultdict[str, list[float]] = defaultdict(list)
    for step in stage.steps():
        rng = np.random.default_rng([settings.seed, step])
        budget = settings.draw(rng)
        chosen = rng.choice(len(train.layouts), budget.pictures, replace=False)
        patches = [choose_patches(train.owners[picture], [], budget.tokens, rng) for picture in chosen]
        kind, make = kinds[step % 2]
        talks = []
        for picture, shown in zip(chosen, patches, strict=True):
            seen = {int(owner) for owner in train.owners[picture][shown] if owner >= 0}
            talks.append(make(train.layouts[picture], seen, rng, tokenizer))
        pictures = train.show(model, chosen, patches)
        stage.update(model(**pad_batch(talks, tokenizer.pad_token_id), images=pictures).loss)
        losses[kind].append(stage.losses[-1])
        if stage.is_due(step):
            stage.save(step, {name: float(np.mean(values)) for name, values in losses.items()})
            losses.clear()


def train_questions(
    work: Path,
    name: str,
    model: LlavaLlamaForCausalLM,
    tokenizer,
    train: Pictures,
    held_out: Pictures,
    settings: LanguageSettings,
) -> None:
    """Stage 4: train, or go on training, all of ``model`` but its tower to answer."""
    stage = Stage(work, name, model, settings)
    for step in stage.steps():
        rng = np.random.default_rng([settings.seed, step])
        budget = settings.draw(rng)
        makers = FIRST_MAKERS if step < settings.first else FIRST_MAKERS + MAKERS
        chosen = rng.choice(len(train.layouts), budget.pictures, replace=False)
        talks, asked = talk_batch(train, chosen, budget.turns, rng, tokenizer, makers)
        pictures = train.encode(model, chosen, asked, budget.tokens, rng)
        stage.update(model(**pad_batch(talks, tokenizer.pad_token_id), images=pictures).loss)
        if stage.is_due(step):
            row = {}
            if stage.is_due(step, every=3):
                right = accuracy(model, tokenizer, held_out, tokens=64, number=96)
                row = {f"val_{kind}": share for kind, share in right.items()}
                row["val_unpruned"] = accuracy(model, tokenizer, held_out, tokens=None, number=48)["all"]
            stage.save(step, row)


@torch.no_grad()
def accuracy(
    model: LlavaLlamaForCausalLM,
    tokenizer,
    pictures: Pictures,
    tokens: int | None,
    number: int,
    favour: bool = True,
    seed: int = 7,
) -> dict[str, float]:
    """Share of answers right to the last token, by kind of question and over all, three questions a picture."""
    rng, right = np.random.default_rng(seed), defaultdict(list)
    order = np.tile(np.arange(min(number, len(pictures.layouts))), 3)
    for chosen in np.array_split(order, max(1, len(order) // (12 if tokens is None else 48))):
        talks, asked = talk_batch(pictures, chosen, 1, rng, tokenizer)
        batch = pad_batch(talks, tokenizer.pad_token_id)
        encoded = pictures.encode(model, chosen, asked, tokens, rng, favour)
        prompts = model.embed_prompts(**batch, images=encoded)
        logits = model(inputs_embeds=prompts.inputs_embeds, attention_mask=prompts.attention_mask).logits
        for talk, good in zip(talks, answers_right(logits, prompts.labels), strict=True):
            right[talk.questions[0].kind].append(good)
    every = [good for values in right.values() for good in values]
    return {**{kind: float(np.mean(values)) for kind, values in sorted(right.items())}, "all": float(np.mean(every))}


def answers_right(logits: Tensor, labels: Tensor) -> list[bool]:
    """Whether greedy decoding would give every labelled token: logits (B, T, vocabulary), labels (B, T)."""
    guess, truth = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((guess == truth) | (truth == IGNORE_INDEX)).all(-1).tolist()
