"""Stages 2 and 3: projector and language model on the trained tower's features. Resumes from its last whole state.

Everything goes through the ordinary ``forward`` of ``llava.model`` with labels; only the pictures are encoded before.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from conversations import Talk, choose_patches, draw_questions, make_talk, pad_batch
from files import write_with
from formats import FIRST_MAKERS, MAKERS
from scenes import Layout
from torch import Tensor, nn
from tower import vision_features
from tqdm import tqdm
from train_tower import cosine_rate, decayed_groups, write_rows
from views import Views, normalize

from llava.constants import IGNORE_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.llava_arch import EncodedImages
from llava.model.view_layout import flat_layout


@dataclass(frozen=True)
class Budget:
    """One way to show pictures: ``tokens`` per view (``None`` = all), how often, and how much fits in a step."""

    tokens: int | None
    share: float
    pictures: int
    turns: int


@dataclass(frozen=True)
class Lesson:
    """What is trained before step ``until``; ``easy`` asks only for things that are named."""

    until: int
    budget: Budget
    easy: bool


# Matching words to patches is learned among four tokens and then holds among many; begun among sixty-four, or with all
# kinds of question at once, it was not learned in a thousand steps.
LESSONS = (
    Lesson(80, Budget(4, 1.0, 96, 1), easy=True),
    Lesson(120, Budget(6, 1.0, 96, 1), easy=True),
    Lesson(170, Budget(10, 1.0, 80, 1), easy=True),
    Lesson(240, Budget(16, 1.0, 64, 2), easy=True),
    Lesson(420, Budget(16, 1.0, 56, 2), easy=False),
)


@dataclass(frozen=True)
class LanguageSettings:
    """Everything the result depends on besides the features."""

    steps: int = 2000
    rate: float = 1e-3
    warmup: int = 40
    weight_decay: float = 0.05
    lessons: tuple[Lesson, ...] = LESSONS
    seed: int = 0
    save_every: int = 100
    budgets: tuple[Budget, ...] = field(
        default=(
            Budget(16, 0.20, 24, 2),
            Budget(32, 0.30, 20, 4),
            Budget(64, 0.20, 16, 5),
            Budget(128, 0.15, 12, 5),
            Budget(192, 0.10, 10, 5),
            Budget(None, 0.05, 5, 6),
        )
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
        rows = []
        for picture, targets in zip(chosen, asked, strict=True):
            patches = pick(self.owners[picture], targets, tokens, rng, favour)
            rows.append(self.features[picture][patches])
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
            with torch.autocast("cpu", dtype=torch.bfloat16):
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
    model: LlavaLlamaForCausalLM, tokenizer, pictures: PaddedPictures, steps: int = 250, seed: int = 0
) -> None:
    """Stage 2: patches of an object become the sum of the word embeddings that name its shape, colour and text.

    Attention begins with keys equal to queries, so that it looks for like tokens, and the output head as the unit word
    embeddings, so that what it copies is said: a word of the question then finds its patches from the first step on.
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
            nn.init.normal_(layer.self_attn.o_proj.weight, std=0.05)
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


def train_language(
    work: Path,
    name: str,
    model: LlavaLlamaForCausalLM,
    tokenizer,
    train: Pictures,
    held_out: Pictures,
    settings: LanguageSettings,
) -> LlavaLlamaForCausalLM:
    """Stage 3: train, or go on training, all of ``model`` but its tower."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = decayed_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95))
    state_path, start, rows, spent = work / f"{name}.pt", 0, [], 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError(f"{state_path} was made with other settings: {state['settings']}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, rows, spent = state["step"], state["rows"], state["seconds"]
    began = time.time() - spent
    shares = np.array([budget.share for budget in settings.budgets])
    progress = tqdm(range(start, settings.steps), name, settings.steps, initial=start, mininterval=5)
    running: list[float] = []
    for step in progress:
        rng = np.random.default_rng([settings.seed, step])
        lesson = next((lesson for lesson in settings.lessons if step < lesson.until), None)
        if lesson is None:
            budget = settings.budgets[rng.choice(len(shares), p=shares / shares.sum())]
        else:
            budget = lesson.budget
        makers = FIRST_MAKERS if lesson is not None and lesson.easy else MAKERS
        chosen = rng.choice(len(train.layouts), budget.pictures, replace=False)
        talks, asked = talk_batch(train, chosen, budget.turns, rng, tokenizer, makers)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * cosine_rate(step, settings.steps, settings.warmup)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pictures = train.encode(model, chosen, asked, budget.tokens, rng)
            loss = model(**pad_batch(talks, tokenizer.pad_token_id), images=pictures).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(running[-50:]):.3f}")
        done = step + 1
        if done % settings.save_every == 0 or done == settings.steps:
            mean_loss = float(np.mean(running[-settings.save_every :]))
            row = {"step": done, "seconds": round(time.time() - began), "loss": mean_loss}
            if done % (3 * settings.save_every) == 0 or done == settings.steps:
                row |= {f"val_{k}": v for k, v in accuracy(model, tokenizer, held_out, tokens=128, number=96).items()}
                row["val_unpruned"] = accuracy(model, tokenizer, held_out, tokens=None, number=48)["all"]
            rows.append(row)
            state = {
                "settings": asdict(settings), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "step": done, "rows": rows, "seconds": time.time() - began,
            }  # fmt: skip
            write_with(state_path, lambda file, state=state: torch.save(state, file))
            write_rows(work / f"{name}.csv", rows)
    return model.eval()


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
        with torch.autocast("cpu", dtype=torch.bfloat16):
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
