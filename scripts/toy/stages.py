"""What the stages of the training share: optimizers, learning rate, and a state from which a killed run goes on."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from files import write_text, write_with
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """How a stage is optimised: Muon on the matrices of the transformer layers, AdamW on everything else.

    After 300 steps the tower read 84 % of the shapes in a batch; with AdamW alone it was at 67 %.
    """

    steps: int
    muon_rate: float
    adam_rate: float
    warmup: int
    weight_decay: float = 0.05
    seed: int = 0
    save_every: int = 100


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def decayed_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: weight decay on matrices, none on biases and gains."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def write_rows(path: Path, rows: list[dict]) -> None:
    """A small CSV, written whole."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(path, text.getvalue())


class Stage:
    """The training of ``model`` under ``settings``, its state in ``work/<name>.pt`` and its log in a CSV beside it.

    A state that exists is loaded. Steps must draw what they need from their own number: then a run that was killed and
    went on ends with the same weights as one that was not.

        for step in stage.steps():
            stage.update(loss_of(step))
            if stage.is_due(step):
                stage.save(step, {"accuracy": ...})

    Raises:
        ValueError: if the state on the disk was made under other settings.
    """

    def __init__(self, work: Path, name: str, model: nn.Module, settings: Schedule) -> None:
        self.path, self.log_path, self.name = work / f"{name}.pt", work / f"{name}.csv", name
        self.model, self.settings = model, settings
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        hidden = [p for n, p in trained.items() if p.ndim == 2 and ".layers." in n]
        others = [p for n, p in trained.items() if not (p.ndim == 2 and ".layers." in n)]
        self.parameters = list(trained.values())
        self.optimizers = {
            "muon": torch.optim.Muon(hidden, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"),
            "adam": torch.optim.AdamW(decayed_groups(others, settings.weight_decay), betas=(0.9, 0.95)),
        }
        self.rates = {"muon": settings.muon_rate, "adam": settings.adam_rate}
        self.start, self.rows, self.losses, spent = 0, [], [], 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            if state["settings"] != asdict(settings):
                raise ValueError(f"{self.path} was made with other settings: {state['settings']}; remove it")
            model.load_state_dict(state["model"])
            for key, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][key])
            self.start, self.rows, spent = state["step"], state["rows"], state["seconds"]
        self.began = time.time() - spent

    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to be done, learning rates set and random numbers seeded for each."""
        settings = self.settings
        progress = tqdm(
            range(self.start, settings.steps), self.name, settings.steps, initial=self.start, mininterval=5
        )
        for step in progress:
            torch.manual_seed(settings.seed + step)
            for key, optimizer in self.optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = self.rates[key] * cosine_rate(step, settings.steps, settings.warmup)
            yield step
            progress.set_postfix(loss=f"{np.mean(self.losses[-50:] or [self.rows[-1]['loss']]):.3f}")

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of ``loss``."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.losses.append(loss.item())

    def is_due(self, step: int, every: int = 1) -> bool:
        """Whether a state is saved after ``step``; with ``every``, whether it is one of every so many or the last."""
        done = step + 1
        return done % (every * self.settings.save_every) == 0 or done == self.settings.steps

    def save(self, step: int, row: dict) -> None:
        """Add a line to the log and replace the state on the disk, each whole or not at all."""
        seconds = time.time() - self.began
        self.rows.append({"step": step + 1, "seconds": round(seconds), "loss": float(np.mean(self.losses)), **row})
        self.losses = []
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizers": {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
            "step": step + 1,
            "rows": self.rows,
            "seconds": seconds,
        }
        write_with(self.path, lambda file: torch.save(state, file))
        write_rows(self.log_path, self.rows)
