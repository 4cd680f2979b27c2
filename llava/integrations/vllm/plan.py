"""The plan for one picture: all that decides which of its tokens the language model reads.

Made in the front end, part of the picture's hash in every cache, carried beside the pixels, read in the worker. No
import of vLLM.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from llava.integrations.vllm.options import PruningOptions, check_names
from llava.layout.candidates import Candidates, candidates_of, check_together
from llava.pruning import Method, PruningInputs, get_pruner, list_pruners, pruner_class
from llava.pruning.options import option_types
from llava.pruning.question_reader import QuestionReader

FIXED = ("keep_tokens", "newlines", "per", "exclude_padding")  # options of a method that others here stand for


@dataclass(frozen=True)
class PictureShape:
    """How many visual tokens a picture or video has, known before the tower runs.

    Args:
        views: V, how many tiles or frames.
        tokens: n, of each of them.
        beside: tokens that stay whatever is pruned.
        eligible: (V,) how many tokens of each view show no padding; ``None`` where all do.
    """

    views: int
    tokens: int
    beside: int = 0
    eligible: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PicturePlan:
    """All that decides which tokens of one picture are kept: its digest is the picture's identity in every cache.

    Args:
        picture: hash of the picture's content and of its preprocessing.
        keep_tokens, rate, least, per: the budget, as in `PruningOptions`.
        method, arguments: the pruner and its options as JSON, its source of relevance settled.
        query: the question; ``None`` where the method does not read it, so that all questions share the picture.
        query_ids: its tokens in the language model's vocabulary, where the method is read there.
    """

    picture: str
    keep_tokens: int | None
    rate: float | None
    least: int
    method: str
    arguments: str
    query: str | None = None
    query_ids: tuple[int, ...] = ()
    per: str = "view"

    @property
    def budget(self) -> PruningOptions:
        return PruningOptions(self.keep_tokens, self.rate, min_visual_tokens=self.least, keep_per=self.per)

    @property
    def pruner(self) -> Method:
        """The method; its own budget is not that of the plan."""
        return make_pruner(self.method, self.arguments)

    def candidates(self, shape: PictureShape) -> list[Candidates]:
        """The selections over the picture: front end and worker count its tokens by them."""
        keep = self.budget.count(shape.tokens * (shape.views if self.per == "picture" else 1))
        pruner = dataclasses.replace(self.pruner, keep_tokens=keep, per=self.per)
        return candidates_of(pruner, [shape.tokens] * shape.views, eligible=shape.eligible)

    def count(self, shape: PictureShape) -> int | None:
        """How many of the picture's tokens are kept; ``None`` for all of them.

        Raises:
            ValueError: the method cannot choose among so many tokens, or not with such budgets.
        """
        candidates = self.candidates(shape)
        if all(one.is_whole for one in candidates):
            return None
        check_together(self.pruner, candidates)
        for one in candidates:
            if not one.is_whole:
                self.pruner.check_tokens(one.tokens)
        return sum(one.keep for one in candidates)

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> PicturePlan:
        values = json.loads(data)
        return cls(**{**values, "query_ids": tuple(values["query_ids"])})

    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


def arguments_of(method: Method | None, given: Mapping[str, Any]) -> str:
    """The options that were given as JSON, with the source of relevance that a settled ``method`` takes."""
    source = {"relevance": method.relevance} if isinstance(method, QuestionReader) else {}
    return json.dumps({**given, **source}, sort_keys=True)


@lru_cache(maxsize=256)
def make_pruner(method: str, arguments: str) -> Method:
    """A method that can be served, from its name and its options as JSON.

    Raises:
        ValueError: an unknown option or a value out of range, a method or a combination that cannot be served.
    """
    options = json.loads(arguments)
    fixed = sorted(set(options) & set(FIXED))
    if fixed:
        raise ValueError(f"image_pruning_args cannot set {', '.join(fixed)}: keep_tokens, keep_per and the server do")
    names = [name for name in option_types(pruner_class(method)) if name not in FIXED]
    check_names(options, names, f"image_pruning_args of {method!r}")
    pruner = get_pruner(method, **options)
    reason = cannot_run(pruner)
    if reason is not None:
        able = [name for name in list_pruners() if cannot_run(get_pruner(name)) is None]
        raise ValueError(
            f"image_pruning_method {method!r} {reason} here; methods that can be served: {', '.join(able)}"
        )
    try_out(pruner)
    return pruner


def cannot_run(pruner: Method) -> str | None:
    """Why a method cannot be served; ``None`` if it can."""
    if pruner.place in ("pixels", "decoder"):
        return f"acts on the {pruner.place}, which cannot be done"
    if pruner.makes_tokens or not pruner.count_is_exact:
        return "does not keep an exact number of the picture's own tokens, and cannot be served"
    if "per" not in option_types(type(pruner)):
        return "has no budget that can be set, and cannot be served"
    if any(one.sequence for one in candidates_of(pruner, [16])):
        return "chooses among separators too, which cannot be done"
    missing = sorted(pruner.needs - READABLE)
    return f"needs {', '.join(missing)}, which cannot be had" if missing else None


READABLE = frozenset({"encoder_features", "image_embeds", "text_embeds", "query_embeds", "relevance"})


def try_out(pruner: Method) -> None:
    """Raise ValueError if a method's options do not even do on 16 tokens, some alike, some padding."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 4, 8, generator=generator).repeat(1, 4, 1)
    own = {"encoder_features": features} if "encoder_features" in pruner.needs else {}
    if "query_embeds" in pruner.needs:
        own["query_embeds"] = torch.randn(1, 3, 8, generator=generator)
    own["relevance"] = torch.rand(1, 16, generator=generator)
    valid = torch.arange(16)[None] < 12
    view_ids = torch.zeros(1, dtype=torch.long)
    try:
        pruner.select(PruningInputs(features, valid=valid, view_ids=view_ids, **own), keep=4)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"pruner '{pruner.name}' cannot select with these options: {error}") from error
