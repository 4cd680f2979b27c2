"""What all pruning methods share: their inputs, their answer, budgets and the registry.

A method is a frozen dataclass. Its fields are its hyper-parameters, and `Pruner.choose` is its mathematics; everything
else (budget, checks, ascending order, gathering, padding) happens once, here.
"""

from __future__ import annotations

import dataclasses
import typing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.functional import relevance_scores

if TYPE_CHECKING:
    from llava.integrations.transformers import AttachedPruner

RELEVANCE_SOURCES = {"image_embeds", "text_embeds", "query_embeds"}  # not needed when the caller brings relevance

_REGISTRY: dict[str, type[Pruner]] = {}


@dataclass(frozen=True)
class PruningInputs:
    """What a host can tell a method about ``B`` views (images, tiles or frames) of ``n`` visual tokens each.

    Args:
        features: (B, n, d) visual tokens after the projector, in the language model's space.
        encoder_features: (B, n, c) the same patches before the projector.
        image_embeds: (B, n, e) patches in the joint image-text space.
        text_embeds: (B or 1, M, e) the question's segments in the joint space.
        text_mask: (B or 1, M) bool, False at padding segments; ``None`` means that all M are real.
        query_embeds: (B or 1, l, d) the question in the language model's input space.
        query_mask: (B or 1, l) bool, like ``text_mask``.
        relevance: (B, n) scores the caller already has; larger is more relevant, no sign is applied to them.
        valid: (B, n) bool, False where a token must not be chosen (padding).
        class_attention: (B, heads, n) attention of the encoder's class token to the patches, in the last layer read.
        mean_attention: (B, heads, n) attention that a patch receives there, the mean over all queries.
        key_metric: (B, n, w) keys of the patches there, the mean over heads.
        class_features: (B, c) class token beside ``encoder_features``.
        pixels: (B, 3, s, s) the views as the encoder got them.
        encode: turns pixels (B', 3, h, w) of any size into projected features (B', tokens, d).
        pictures: (B,) int64, which views show the same picture; ``None`` means that every view is a picture.
        relevance_sign: the sign under which cos(image_embeds, text_embeds) grows with relevance: -1 for CLIP towers.
        view_ids: (B,) int64, a number per view that does not depend on the batch it comes in; seeds `random`.
    """

    features: Tensor
    encoder_features: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    text_mask: Tensor | None = None
    query_embeds: Tensor | None = None
    query_mask: Tensor | None = None
    relevance: Tensor | None = None
    valid: Tensor | None = None
    class_attention: Tensor | None = None
    mean_attention: Tensor | None = None
    key_metric: Tensor | None = None
    class_features: Tensor | None = None
    pixels: Tensor | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    pictures: Tensor | None = None
    relevance_sign: int = -1
    view_ids: Tensor | None = None

    def __post_init__(self):
        if self.features.ndim != 3:
            raise ValueError(f"features must be (views, tokens, width), got shape {tuple(self.features.shape)}")
        shape = self.features.shape[:2]
        for name in ("encoder_features", "image_embeds", "relevance", "valid", "key_metric"):
            value = getattr(self, name)
            if value is not None and value.shape[:2] != shape:
                raise ValueError(f"{name} must start with (B, n) = {tuple(shape)}, got shape {tuple(value.shape)}")
        for name in ("class_attention", "mean_attention"):
            value = getattr(self, name)
            if value is not None and (value.ndim != 3 or (value.shape[0], value.shape[2]) != shape):
                raise ValueError(
                    f"{name} must be (B, heads, n) with (B, n) = {tuple(shape)}, got {tuple(value.shape)}"
                )
        for name in ("class_features", "pixels", "pictures", "view_ids"):
            value = getattr(self, name)
            if value is not None and value.shape[0] != shape[0]:
                raise ValueError(f"{name} must have {shape[0]} rows, got shape {tuple(value.shape)}")
        for name in ("text_embeds", "text_mask", "query_embeds", "query_mask"):
            value = getattr(self, name)
            if value is not None and value.shape[0] not in (1, shape[0]):
                raise ValueError(f"{name} must have 1 or {shape[0]} rows, got shape {tuple(value.shape)}")

    @property
    def views(self) -> int:
        return self.features.shape[0]

    @property
    def tokens(self) -> int:
        return self.features.shape[1]


@dataclass(frozen=True)
class Selection:
    """The m tokens that a method keeps in each of B views, and the k that it makes itself.

    Args:
        indices: (B, m) int64, distinct and ascending within a view.
        tokens: n, how many there were.
        eligible: (B, m) bool, False where a view had fewer than m valid tokens and an invalid one fills the place;
            ``None`` means that all are eligible.
        details: what the method computed on the way, tensors (B, ...) by name, for viewers and reports.
        made: (B, k, c) tokens that stand after the kept ones of their view, in the space that the method acts on:
            encoder features for `Pruner.place` "encoder", projected ones otherwise. `Pruner.stand` says how many of
            them, from the first, stand in a view with padding. The budget counts m + k. ``None`` means none.
        leading: so many of ``made`` stand before the kept tokens of a view that is read on its own, and before all
            other made tokens of views that are read as one grid.
    """

    indices: Tensor
    tokens: int
    eligible: Tensor | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)
    made: Tensor | None = None
    leading: int = 0

    @property
    def is_identity(self) -> bool:
        return self.indices.shape[1] == self.tokens

    @property
    def mask(self) -> Tensor:
        """(B, n) bool, True at the kept tokens."""
        mask = self.indices.new_zeros(self.indices.shape[0], self.tokens, dtype=torch.bool)
        return mask.scatter_(1, self.indices, True if self.eligible is None else self.eligible)

    def gather(self, features: Tensor) -> Tensor:
        """The kept rows of ``features`` (B, n, d) -> (B, m, d), in the features' own dtype, without ``made`` ones."""
        if self.is_identity:
            return features
        return features.gather(1, self.indices[:, :, None].expand(-1, -1, features.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """Base of all methods: keep the ``keep_tokens`` best of a view's visual tokens.

    A method that makes tokens of its own overrides `count_made` and `make` beside `choose`.

    Args:
        keep_tokens: tokens given per view, kept and made, as a count (int >= 1) or as a share of them (float between
            0 and 1). A count of n or more keeps everything, bit for bit.
        newlines: "drop" gives exactly the promised count; "keep" also keeps the newline token of every grid row that
            still has a token (LLaVA-NeXT), on top of the count.
        exclude_padding: patches that show only padding cannot be chosen; a view with fewer other patches than
            ``keep_tokens`` keeps all of those.
        scope: "view" selects within each view; "global" makes one selection over all views of a picture, with
            ``keep_tokens`` times their number as its budget.
    """

    keep_tokens: int | float = 64
    newlines: Literal["drop", "keep"] = "drop"
    exclude_padding: bool = True
    scope: Literal["view", "global"] = "view"

    name: ClassVar[str]
    place: ClassVar[Literal["pixels", "encoder", "projected", "decoder"]] = "projected"  # what the method acts on
    floor: ClassVar[int] = 1  # the smallest budget at which the method is what its paper describes
    below_floor: ClassVar[str] = ""  # what it gives under a smaller one

    def __post_init__(self):
        check_budget(self.keep_tokens)
        if isinstance(self.keep_tokens, int):
            self._check_floor(self.keep_tokens)
        for option in dataclasses.fields(self):
            allowed = typing.get_args(option_types(type(self))[option.name])
            value = getattr(self, option.name)
            if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                raise ValueError(f"{option.name} must be one of {', '.join(allowed)}; got {value!r}")
        if self.makes_tokens and self.scope != "view":
            raise ValueError(f"pruner '{self.name}' makes tokens of each view: scope must be view, got {self.scope!r}")

    def _check_floor(self, keep: int) -> None:
        if keep < self.floor:
            message = (
                f"pruner '{self.name}' needs {self.floor} tokens per view; with {keep} it gives {self.below_floor}"
            )
            warnings.warn(message, stacklevel=2)

    @property
    def count_is_exact(self) -> bool:
        """Whether a view gives just `count` tokens; False for a method whose count depends on what it sees."""
        return True

    @property
    def makes_tokens(self) -> bool:
        """Whether the method gives tokens that no patch has."""
        return type(self).make is not Pruner.make

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `PruningInputs` fields, beside ``features``, without which the method cannot work."""
        return frozenset()

    def count(self, tokens: int) -> int:
        """How many tokens a view of ``tokens`` tokens gives, kept and made: known before any computation."""
        if isinstance(self.keep_tokens, float):
            return max(1, int(self.keep_tokens * tokens + 0.5))
        return min(self.keep_tokens, tokens)

    def count_made(self, keep: int) -> int:
        """How many of a view's ``keep`` tokens the method makes itself."""
        return 0

    def stand(self, keep: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on of each view: kept and made tokens (V,), from its ``eligible`` patches (V, n) on the CPU.

        A view gives no token for which it has no patch: where eligible ones are fewer than ``keep``, as many as there
        are.
        """
        patches = eligible.sum(-1)
        made = self.count_made(keep)
        kept = patches.clamp_max(keep - made)
        return kept, (patches - kept).clamp_max(made)

    def select(self, inputs: PruningInputs, keep: int | None = None) -> Selection:
        """Choose ``keep`` (default: the method's own budget) of the n tokens of every view.

        Raises:
            ValueError: if a field that the method needs is missing from ``inputs``; the message names it.
        """
        needed = self.needs if inputs.relevance is None else self.needs - RELEVANCE_SOURCES
        missing = sorted(name for name in needed if getattr(inputs, name) is None)
        if missing:
            raise ValueError(f"pruner '{self.name}' needs {', '.join(missing)}, which this host did not give")
        views, tokens = inputs.features.shape[:2]
        keep = self.count(tokens) if keep is None else keep
        if keep >= tokens:
            everything = torch.arange(tokens, device=inputs.features.device)
            return Selection(everything.expand(views, -1), tokens)
        self._check_floor(keep)
        made = self.count_made(keep)
        indices, details = self.choose(inputs, keep - made)
        selection = Selection(indices, tokens, self.eligible(inputs, indices, details), details)
        return self.make(inputs, selection, made) if made else selection

    @abstractmethod
    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The method itself: ``keep`` < n distinct, ascending indices (B, keep) int64, and what led to them.

        ``keep`` does not count made tokens, and is 0 where the whole budget is made. Tokens that are not
        ``inputs.valid`` may only fill places that valid ones cannot.
        """

    def eligible(self, inputs: PruningInputs, indices: Tensor, details: Mapping[str, Tensor]) -> Tensor | None:
        """(B, m) bool, which of the chosen ``indices`` really go on; ``None`` means all."""
        return None if inputs.valid is None else inputs.valid.gather(1, indices)

    def make(self, inputs: PruningInputs, kept: Selection, count: int) -> Selection:
        """Add ``count`` tokens per view of the method's own to those kept: see `Selection.made`."""
        return kept

    def attach(self, model: Any, processor: Any = None, **options: Any) -> AttachedPruner:
        """Prune in every call of a model of the Transformers library, until the handle's ``remove()``.

        Args:
            model: an instance of the library's own class, such as ``LlavaForConditionalGeneration``.
            processor: its processor or tokenizer, for methods that read the question.
            options: ``query``, ``positions``, ``clip``, ``siglip``: see `AttachedPruner`.
        """
        from llava.integrations.transformers import AttachedPruner  # needs more than torch

        return AttachedPruner(self, model, processor, **options)

    @contextmanager
    def __call__(self, model: Any, processor: Any = None, **options: Any) -> Iterator[AttachedPruner]:
        """`attach` for the length of a block: ``with pruner(model, processor): model.generate(...)``."""
        handle = self.attach(model, processor, **options)
        try:
            yield handle
        finally:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class RelevancePruner(Pruner):
    """Base of the methods that read how relevant a token is to the question.

    Args:
        relevance_sign: sign under which similarity in the joint space grows with relevance; ``None`` takes what the
            host states, -1 for CLIP towers.
    """

    relevance_sign: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.relevance_sign not in (None, -1, 1):
            raise ValueError(f"relevance_sign must be -1 or 1, got {self.relevance_sign}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"image_embeds", "text_embeds"})

    def without_joint_space(self) -> Pruner:
        """The method for a host that has no joint space of patches and texts.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(
            f"pruner '{self.name}' compares patches with the question in a joint space, for which this model lacks "
            "the text tower: give the folder of its full vision-language encoder, or take another method"
        )

    def sign(self, inputs: PruningInputs) -> int:
        return inputs.relevance_sign if self.relevance_sign is None else self.relevance_sign

    def joint_relevance(self, inputs: PruningInputs, normalise: bool = True) -> Tensor:
        """Raw scores (B, n) in the joint space as `relevance_scores` gives them, or those that the caller brought."""
        if inputs.relevance is not None:
            return inputs.relevance
        return relevance_scores(
            inputs.image_embeds, inputs.text_embeds, inputs.text_mask, self.sign(inputs), normalise
        )


def keep_none(inputs: PruningInputs) -> Tensor:
    """Indices (B, 0): what a method chooses that makes all of its tokens."""
    return torch.empty(inputs.views, 0, dtype=torch.int64, device=inputs.features.device)


def check_budget(keep_tokens: Any) -> None:
    """Raise ValueError unless ``keep_tokens`` is a count (int >= 1) or a share (float strictly between 0 and 1)."""
    is_count = isinstance(keep_tokens, int) and not isinstance(keep_tokens, bool) and keep_tokens >= 1
    is_share = isinstance(keep_tokens, float) and 0 < keep_tokens < 1
    if not (is_count or is_share):
        raise ValueError(
            f"keep_tokens must be a count (integer from 1) or a share of the tokens (between 0 and 1, both excluded); "
            f"got {keep_tokens!r}"
        )


def register(cls: type[Pruner]) -> type[Pruner]:
    """Class decorator that makes a method known under its ``name``."""
    if cls.name in _REGISTRY:
        raise ValueError(f"two pruners are called '{cls.name}'")
    _REGISTRY[cls.name] = cls
    return cls


def list_pruners() -> list[str]:
    """Names of all methods, in alphabetical order."""
    return sorted(_REGISTRY)


def pruner_class(name: str) -> type[Pruner]:
    """The class of a method. Raises ValueError with the valid names."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown pruner {name!r}; known pruners: {', '.join(list_pruners())}")
    return _REGISTRY[name]


def get_pruner(name: str, **options: Any) -> Pruner:
    """Make a method by name: ``get_pruner("script", keep_tokens=64, tau=0.5)``.

    Raises:
        ValueError: for an unknown name, an unknown option or a value out of range; the message lists what is valid.
    """
    cls = pruner_class(name)
    valid = [option.name for option in dataclasses.fields(cls)]
    unknown = [option for option in options if option not in valid]
    if unknown:
        raise ValueError(f"pruner '{name}' has no option {', '.join(unknown)}; its options: {', '.join(valid)}")
    return cls(**options)


def option_types(cls: type[Pruner]) -> dict[str, Any]:
    """The type of every option of a method, by name."""
    hints = typing.get_type_hints(cls)
    return {option.name: hints[option.name] for option in dataclasses.fields(cls)}
