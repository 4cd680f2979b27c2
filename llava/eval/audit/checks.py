"""What is checked, one function a line of the report.

Each check gives a `Finding`: passed, failed, or neither where it does not apply, with the figure that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.eval.audit.pictures import AuditPicture
from llava.eval.audit.subject import Subject, Trace
from llava.pruning import Method

READS_BELOW = 0.9  # overlap of the kept sets of two questions, from which a method is said to read the question
FINDS_FROM = 0.6  # area under the ROC curve of relevance on what was asked about
GREY = (128, 128, 128)


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Args:
        check: what was looked at.
        passed: ``None`` where it does not apply, or is a figure without a verdict.
        text: what was found, in words.
        figures: the numbers of it.
    """

    check: str
    passed: bool | None
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


# --- 1. promises ---------------------------------------------------------------------------------------------------


def keeps_all_bit_for_bit(subject: Subject, everything: Method, pictures: Sequence[AuditPicture]) -> Finding:
    """A budget of all tokens gives the logits of the unpruned model."""
    picture, question = pictures[0].image, pictures[0].questions[0].text
    plain, whole = (subject.trace(picture, question, method).logits for method in (None, everything))
    worst = float((plain - whole).abs().max())
    return Finding("keep all = unpruned", worst == 0, f"largest difference of the logits {worst:g}", {"worst": worst})


def keeps_count_order_and_text(subject: Subject, method: Method, pictures: Sequence[AuditPicture]) -> list[Finding]:
    """What reaches the decoder is the unpruned prompt with visual tokens left out, and nothing else."""
    picture, question = pictures[0].image, pictures[0].questions[0].text
    plain, pruned = (subject.trace(picture, question, each) for each in (None, method))
    kept = int(pruned.kept[0].sum())
    total = len(pruned.kept[0])
    text = len(plain.embeds) - total  # separators among it
    cache = Finding(
        "cache = text + kept",
        None if method.place == "decoder" else pruned.cache == (len(pruned.embeds),) * len(pruned.cache),
        f"{pruned.cache[0]} in the first layer, {pruned.cache[-1]} in the last; text and separators of the whole "
        f"prompt {text}, kept {kept} of {total}, made {pruned.made}",
        {"cache": list(pruned.cache), "kept": kept, "made": pruned.made, "tokens": total},
    )
    promise = pruned.promised
    count = Finding(
        "count = promised",
        None if promise is None else (kept, pruned.made) == promise,
        f"kept {kept}, made {pruned.made}"
        + ("; only the data tell how many" if promise is None else f"; promised {promise[0]} and {promise[1]}"),
        {"kept": kept, "made": pruned.made, "promised": promise},
    )
    places = matched(plain.embeds, pruned.embeds)
    unknown = len(pruned.embeds) - len(places)
    made = pruned.made if promise is None else promise[1]  # by the method's word, not by the host's
    order = Finding(
        "order of reading",
        unknown == made,
        f"{len(places)} of {len(pruned.embeds)} positions are those of the whole prompt, in its order; "
        f"{unknown} others, {made} of them made by the method",
        {"matched": len(places), "others": unknown},
    )
    return [cache, count, order, positions_as_promised(plain, pruned, places), *deep_planes(plain, pruned)]


def matched(whole: Tensor, part: Tensor) -> list[int]:
    """Places in ``whole`` (L, d) of the rows of ``part`` (L', d) that stand there, ascending; bit for bit."""
    places, start = [], 0
    for row in part:
        same = (whole[start:] == row).all(-1).nonzero()
        if len(same):
            start += int(same[0]) + 1
            places.append(start - 1)
    return places


def positions_as_promised(plain: Trace, pruned: Trace, places: Sequence[int]) -> Finding:
    """Positions count on without gaps, or are those of the whole prompt."""
    if pruned.positions is None:
        return Finding("positions", None, "the decoder counts them itself")
    positions = pruned.positions
    counted = bool((positions.diff(dim=-1) == 1).all())
    original = (
        plain.positions is not None
        and len(places) == positions.shape[-1]
        and torch.equal(positions, plain.positions[..., torch.tensor(places)])
    )
    kind = "counted on without gaps" if counted else "those of the whole prompt" if original else "neither"
    return Finding("positions", counted or original, f"{kind}: {int(positions.min())} to {int(positions.max())}")


def deep_planes(plain: Trace, pruned: Trace) -> list[Finding]:
    """Features that later layers add are gathered by the same list as the tokens."""
    if not plain.planes or not pruned.kept:
        return []
    kept = pruned.kept[0]

    def is_gathered(whole: Tensor, part: Tensor) -> bool:
        if not pruned.made:
            return torch.equal(whole[kept], part)
        return len(part) == int(kept.sum()) + pruned.made and matched(whole, part) == kept.nonzero().flatten().tolist()

    same = [is_gathered(whole, part) for whole, part in zip(plain.planes, pruned.planes, strict=True)]
    return [Finding("deep features", all(same), f"{sum(same)} of {len(same)} planes are gathered by the same list")]


def batches_equal_singles(subject: Subject, method: Method, pictures: Sequence[AuditPicture]) -> Finding:
    """Two prompts in one batch keep what each keeps alone."""
    shown = [pictures[0], pictures[-1]]
    images, questions = [p.image for p in shown], [p.questions[0].text for p in shown]
    together = subject.traces(images, questions, method)
    alone = [subject.trace(image, question, method) for image, question in zip(images, questions, strict=True)]
    same = [torch.equal(a.kept[0], b.kept[0]) for a, b in zip(together, alone, strict=True)]
    worst = max(float((a.logits - b.logits).abs().max()) for a, b in zip(together, alone, strict=True))
    text = f"kept sets equal in {sum(same)} of 2, largest difference of the logits {worst:.2g}"
    return Finding("batch = singles", all(same), text, {"worst": worst})


# --- 2. does it read the question? ---------------------------------------------------------------------------------


def overlap(first: Tensor, second: Tensor) -> float:
    """Share of the kept tokens that two kept sets (t,) have in common."""
    return 2 * int((first & second).sum()) / max(int(first.sum() + second.sum()), 1)


def reads_the_question(subject: Subject, method: Method, pictures: Sequence[AuditPicture]) -> list[Finding]:
    """Overlap of what is kept for two questions, two wordings of one, and two pictures under one question."""
    kept: dict[tuple[str, str], Tensor] = {}

    def of(picture: AuditPicture, text: str) -> Tensor:
        if (picture.name, text) not in kept:
            kept[picture.name, text] = subject.trace(picture.image, text, method).kept[0]
        return kept[picture.name, text]

    questions = [overlap(of(p, p.questions[0].text), of(p, p.questions[1].text)) for p in pictures]
    wordings = [overlap(of(p, q.text), of(p, q.rephrased)) for p in pictures for q in p.questions[:1]]
    across = [
        overlap(of(a, a.questions[0].text), of(b, a.questions[0].text))
        for a, b in pairwise(pictures)
        if len(of(a, a.questions[0].text)) == len(of(b, a.questions[0].text))
    ]
    share = fmean(float(mask.float().mean()) for mask in kept.values())
    if share == 0:
        return [Finding("reads the question", None, "it keeps no token as it is: all are made")]
    overlaps = {"questions": fmean(questions), "wordings": fmean(wordings), "random": share}
    overlaps |= {"pictures": fmean(across)} if across else {}
    text = ", ".join(f"{name} {value:.2f}" for name, value in overlaps.items())
    figures = {f"{name}_overlap": value for name, value in overlaps.items()}
    reads = method.reads_question
    passed = overlaps["questions"] < READS_BELOW if reads else overlaps["questions"] == 1
    if method.place == "decoder":
        passed = None  # read by attention: what it must show is not known beforehand
    kind = "reads the question" if reads or method.place == "decoder" else "does not read the question"
    return [Finding(kind, passed, f"overlap of kept sets for two {text}", figures)]


# --- 3. does it find what is asked? --------------------------------------------------------------------------------


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive token scores higher than another one, ties counted half.

    Args:
        scores: (t,) of any floating dtype.
        positive: (t,) bool, True somewhere and False somewhere.
    """
    high, low = scores[positive].double(), scores[~positive].double()
    above = (high[:, None] > low).double() + 0.5 * (high[:, None] == low)
    return float(above.mean())


def finds_what_is_asked(subject: Subject, method: Method, pictures: Sequence[AuditPicture]) -> list[Finding]:
    """Relevance on the boxes, under the own and under another question; kept tokens on the boxes."""
    own, other, pair, lifts = [], [], [], []
    for picture in pictures:
        shown = subject.eligible(picture.image)
        boxes = [subject.shows(picture.image, question.boxes) & shown for question in picture.questions]
        traces = [subject.trace(picture.image, question.text, method) for question in picture.questions]
        for number, (box, trace) in enumerate(zip(boxes, traces, strict=True)):
            if not bool(box.any()) or not bool((~box & shown).any()):
                continue
            kept, scores = trace.kept[0], trace.relevance[0]
            if bool(kept.any()):
                lifts.append(float(box[kept].float().mean()) / float(box[shown].float().mean()))
            if scores is None:
                continue
            following = (number + 1) % len(traces)
            own.append(area_under_curve(scores[shown], box[shown]))
            other.append(area_under_curve(traces[following].relevance[0][shown], box[shown]))
            only_other = boxes[following] & ~box
            if bool(only_other.any()):
                either = box | only_other
                pair.append(area_under_curve(scores[either], box[either]))
    findings = []
    if own:
        figures = {"auc": fmean(own), "other": fmean(other), "error": error_of(own), "questions": len(own)}
        figures |= {"pair": fmean(pair), "pair_error": error_of(pair)} if pair else {}
        findings += sign_and_auc(figures)
    if lifts:
        text = f"{fmean(lifts):.2f} times as many kept tokens on what was asked about as chance would put there"
        findings.append(Finding("kept tokens on the boxes", None, text, {"lift": fmean(lifts)}))
    return findings


def sign_and_auc(figures: dict[str, Any]) -> list[Finding]:
    """The verdict on an area under the ROC curve, the loudest one where the sign is wrong.

    What stands out in a picture is ranked above its background whatever is asked. Whether the *question* is read is
    told by the asked thing against the one that the other question asks about.
    """
    auc, error = figures["auc"], figures["error"]
    told = f"AUC {auc:.3f} (+- {error:.3f}, {figures['questions']} questions); with the other sign {1 - auc:.3f}"
    if auc < 0.5 - 2 * error:
        sign = Finding("SIGN", False, f"THE SIGN OF RELEVANCE IS WRONG HERE: {told}. Turn relevance_sign", figures)
    else:
        sign = Finding("sign", None if auc < 0.5 + 2 * error else True, told, figures)
    findings = [sign, Finding("finds what is asked", auc >= FINDS_FROM, f"AUC {auc:.3f}, chance is 0.5", figures)]
    if "pair" in figures:
        pair, spread = figures["pair"], figures["pair_error"]
        text = (
            f"the asked thing against the other question's: AUC {pair:.3f} (+- {spread:.3f}); all of the picture with "
            f"the other question's relevance: {figures['other']:.3f}"
        )
        findings.append(Finding("by the question, not by what stands out", pair > 0.5 + 2 * spread, text, figures))
    return findings


def error_of(values: Sequence[float]) -> float:
    """Standard error of a mean; 0 where one value cannot tell."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


# --- 4. does the answer need the picture? --------------------------------------------------------------------------


def is_right(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an accepted answer stands in the answer as words of its own."""
    words = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in answer.lower()).split())} "
    return any(f" {one} " in words for one in accepted)


def needs_the_picture(subject: Subject, method: Method, pictures: Sequence[AuditPicture], keep: int) -> Finding:
    """Right answers without a picture, with a grey one, with the model's own smaller one, pruned and unpruned."""
    right: dict[str, list[bool]] = {}
    for picture in pictures:
        smaller, shrinks = subject.smaller(picture.image, keep)
        for question in picture.questions:
            whole = subject.answer(picture.image, question.text, None)
            accepted = question.answers or (" ".join(whole.lower().split()),)
            answers = {
                "blind": subject.answer(None, question.text, None),
                "grey": subject.answer(Image.new("RGB", picture.image.size, GREY), question.text, None),
                "pruned": subject.answer(picture.image, question.text, method),
                "unpruned": whole,
            }
            if smaller is not None or shrinks is not None:
                answers["native"] = subject.answer(smaller or picture.image, question.text, shrinks)
            for name, answer in answers.items():
                right.setdefault(name, []).append(is_right(answer, accepted))
    figures = {name: fmean(found) for name, found in right.items()}
    text = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    blind = max(figures["blind"], figures["grey"])
    verdict = figures["pruned"] > blind if figures["unpruned"] > blind else None
    if verdict is None:
        text += "; these questions do not show it: unpruned is no better than without the picture"
    return Finding("needs the picture", verdict, f"right answers: {text}", figures)
