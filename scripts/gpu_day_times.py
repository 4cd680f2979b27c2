"""How long the parts of a day on a GPU may take: guesses, and in words what each is made from.

What a question of a benchmark takes is measured on the machine itself. The audit and the efficiency presets are
counted in unpruned answers, and an answer is taken to last as long as a measured question, or as the paper prints it.
How the constants were measured stands in docs/paper.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from llava.eval.measure.cost import prefill_flops
from llava.eval.measure.geometry import GEOMETRIES
from llava.eval.tables.paper import PAPER_ROWS
from llava.model.builder import TOY_FOLDER

AUDIT_ANSWERS = 24  # prefills of the audit of one method on one picture, counted on the toy; later pictures take fewer
INTERPRETED = {"kernels": 360.0, "selection": 83.0}  # seconds on two cores under load, without a GPU
NEW_TOKENS = 16  # of an answer: the efficiency command's
PATCHES = {"v1_5": 576, "v1_6": 2880}  # visual tokens of a picture


@dataclass(frozen=True)
class Guess:
    """How long something may take.

    Args:
        seconds: ``None`` where there is nothing to guess from.
        basis: what it is made from, for a reader.
    """

    seconds: float | None
    basis: str


@dataclass(frozen=True)
class Speed:
    """How long an unpruned answer takes somewhere.

    Args:
        seconds: of an answer.
        work: multiply-accumulates of its visual tokens in prefill.
        source: who says so.
    """

    seconds: float
    work: float
    source: str

    def scaled(self, work: float, name: str) -> Speed:
        """That of another model, in proportion to its work."""
        if work == self.work:
            return self
        return Speed(self.seconds * work / self.work, work, f"{self.source}, scaled to the work of {name}")


def paper_speed() -> Speed:
    """What the paper prints of LLaVA-NeXT-7B unpruned, in its Table 6."""
    printed = next(row.printed for row in PAPER_ROWS if row.table == 6 and row.method == "unpruned")
    seconds = (printed["prefill_ms"] + NEW_TOKENS * printed["decode_ms"]) / 1e3
    told = f"the paper's {printed['prefill_ms']:g} ms + {NEW_TOKENS} x {printed['decode_ms']:g} ms of LLaVA-NeXT-7B"
    return Speed(seconds, printed["tflops"] * 1e12 / 2, told)


def measured_speed(folder: Path, family: str, questions: list[float]) -> Speed:
    """What probes measured on this machine: the mean over benchmarks, seconds a question each."""
    told = f"a question of {folder.name}, measured on this machine in {len(questions)} benchmarks"
    return Speed(fmean(questions), work_of(folder, family), told)


def work_of(folder: Path, family: str) -> float:
    """Multiply-accumulates of a picture's visual tokens in a checkpoint's language model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = [PATCHES[family]] * config["num_hidden_layers"]
    return prefill_flops(layers, config["hidden_size"], config["intermediate_size"])


def work_of_preset(name: str) -> float | None:
    """The same of a preset of the efficiency command; ``None`` for one of the Transformers library's models."""
    if name == "toy":
        return work_of(TOY_FOLDER / "llava-toy-v1.5", "v1_5")
    if name not in GEOMETRIES:
        return None
    sizes = GEOMETRIES[name]
    tokens = PATCHES["v1_6" if sizes.picture == (672, 672) else "v1_5"]
    if sizes.frames is not None:
        tokens = sizes.frames * (sizes.view_side // 14 // 2) ** 2
    return prefill_flops([tokens] * sizes.layers, sizes.width, sizes.ffn)


def of_audit(methods: int, pictures: int, speed: Speed | None) -> Guess:
    if speed is None:
        return Guess(None, "no question was measured, and the paper's speed is a GPU's")
    answers = methods * pictures * AUDIT_ANSWERS
    return Guess(answers * speed.seconds, f"{answers} answers of {speed.seconds:.2g} s: {speed.source}")


def of_efficiency(preset: str, rows: int, repeats: int, speed: Speed | None) -> Guess:
    """``rows`` of ``repeats`` and one to warm up; how long the weights are made was never measured."""
    if speed is None:
        return Guess(None, "no question was measured, and the paper's speed is a GPU's")
    work = work_of_preset(preset)
    speed = speed.scaled(paper_speed().work if work is None else work, "LLaVA-NeXT-7B" if work is None else preset)
    answers = rows * (1 + 2 * (1 + repeats))  # counting, then every repeat in stages and as a whole
    told = f"{answers} unpruned answers of {speed.seconds:.2g} s, without making the weights: {speed.source}"
    return Guess(answers * speed.seconds, told)


def of_interpreted(kind: str) -> Guess:
    how = "in Triton's interpreter" if kind == "kernels" else "in PyTorch"
    return Guess(INTERPRETED[kind], f"as long as {how} on two cores without a GPU, under load")
