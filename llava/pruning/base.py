"""What all pruning methods share: budgets, checks, the registry, and the two kinds of method.

A method is a frozen dataclass whose fields are its options. A `Pruner` chooses among the tokens of a view before the
language model reads them, and `Pruner.choose` is its mathematics; everything else (budget, checks, order, gathering,
padding) happens once, here. A `DecoderPruner` (decoder_pruner.py) cuts between the decoder's layers.
"""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.attaching import attach
from llava.pruning.auto_budget import AutoBudget, parse_auto
from llava.pruning.budget_curves import set_by_curves
from llava.pruning.functional import without_autocast
from llava.pruning.inputs import PruningInputs, Selection
from llava.pruning.options import check_options, parse_assignments

Place = Literal["pixels", "encoder", "projected", "decoder"]

_REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What every method is: a name, a place, a budget, options that are checked when it is made.

    Args:
        keep_tokens: visual tokens given, kept and made, as a count (int >= 1) or as a share of them (float between 0
            and 1). A count of all or more keeps everything, bit for bit. "auto", or "auto:0.9", lets a method whose
            order says how much the kept tokens explain find the count itself; "auto:mean_tokens=64:curves=FILE" one
            whose mean is 64: see auto_budget.py.
        exclude_padding: patches that show only padding cannot be chosen.

    Raises:
        ValueError: an option is not of its type or out of its range; names it and what it may be.
    """

    keep_tokens: int | float | str = 64
    exclude_padding: bool = True

    name: ClassVar[str]
    place: ClassVar[Place]  # what the method acts on
    makes_tokens: ClassVar[bool] = False  # does it give tokens that no patch has?
    makes_means: ClassVar[bool] = False  # are these weighted means of the view's tokens, with `Selection.weights`?
    finds_budget: ClassVar[bool] = False  # may keep_tokens be "auto"?

    def __post_init__(self):
        check_options(self)
        if isinstance(self.keep_tokens, str):
            if not self.finds_budget:
                able = [name for name in list_pruners() if pruner_class(name).finds_budget]
                raise ValueError(
                    f"pruner '{self.name}' needs a count or a share: keep_tokens={self.keep_tokens} is for methods "
                    f"whose order says how much the kept tokens explain, {', '.join(able)}"
                )
            rule = parse_auto(self.keep_tokens)
            if rule.curves is not None:
                rule = set_by_curves(rule, self)
            object.__setattr__(self, "keep_tokens", str(rule))

    @property
    def auto(self) -> AutoBudget | None:
        """The rule that finds the count; ``None`` where the count is given."""
        return parse_auto(self.keep_tokens) if isinstance(self.keep_tokens, str) else None

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `PruningInputs` fields, beside ``features``, without which the method cannot work."""
        return frozenset()

    @property
    def count_is_exact(self) -> bool:
        """Whether a view gives just `count` tokens; False for a method whose count depends on what it sees."""
        return True

    @property
    def compares_views(self) -> bool:
        """Whether what a view gives depends on the other views of its picture, which must be selected with it."""
        return False

    @property
    def reads_question(self) -> bool:
        """Whether the question decides which tokens are kept."""
        return False

    def count(self, tokens: int) -> int:
        """The budget out of ``tokens`` tokens, kept and made: known before any computation.

        The most that it can be where `count_is_exact` is False.
        """
        if self.auto is not None:
            return self.auto.most(tokens)
        if isinstance(self.keep_tokens, float):
            return max(1, int(self.keep_tokens * tokens + 0.5))
        return min(self.keep_tokens, tokens)

    def keeps_all(self, tokens: int) -> bool:
        """Whether the budget reaches all of ``tokens``."""
        return self.count(tokens) >= tokens

    def attach(self, model: Any, processor: Any = None, **options: Any) -> Any:
        """Prune in every call of a model until the handle's ``remove()``: see `llava.pruning.attaching`."""
        return attach(self, model, processor, **options)

    @contextmanager
    def __call__(self, model: Any, processor: Any = None, **options: Any) -> Iterator[Any]:
        """`attach` for the length of a block: ``with pruner(model, processor): model.generate(...)``."""
        handle = self.attach(model, processor, **options)
        try:
            yield handle
        finally:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class ViewMethod(Method):
    """What chooses among the visual tokens of a view, before the language model reads them.

    Args:
        keep_tokens: per view, unless the method has an option that says otherwise. A view with fewer tokens that may
            be chosen gives all of those.
        newlines: "drop" gives exactly the promised count; "keep" also keeps the newline token of every grid row that
            still has a token (LLaVA-NeXT), on top of the count.
    """

    newlines: Literal["drop", "keep"] = "drop"

    place: ClassVar[Place] = "projected"
    floor: ClassVar[int] = 1  # the smallest budget at which the method is what its paper describes
    below_floor: ClassVar[str] = ""  # what it gives under a smaller one
    scope = "view"  # which tokens compete, and what the budget is for: options of `Pruner`, fixed for all others
    per = "view"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.keep_tokens, int):
            self._check_floor(self.keep_tokens)

    def _check_floor(self, keep: int) -> None:
        if keep < self.floor:
            message = (
                f"pruner '{self.name}' needs {self.floor} tokens per view; with {keep} it gives {self.below_floor}"
            )
            warnings.warn(message, stacklevel=2)

    def kept_and_made(self, keep: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens each view gives, kept (V,) and made (V,), from its ``eligible`` patches (V, n) on the CPU.

        A view gives no token for which it has no patch: where eligible ones are fewer than ``keep``, as many as there
        are.
        """
        kept = eligible.sum(-1).clamp_max(keep)
        return kept, torch.zeros_like(kept)

    def check_tokens(self, tokens: int) -> None:
        """Raise ValueError if the method cannot choose among so many tokens of a view: a layout that it needs."""

    def lacking(self, inputs: PruningInputs) -> list[str]:
        """Names of the fields that the method needs and ``inputs`` does not have."""
        return sorted(name for name in self.needs if getattr(inputs, name) is None)

    def select(self, inputs: PruningInputs, keep: int | None = None) -> Selection:
        """Choose ``keep`` (default: the method's own budget) of the n tokens of every view.

        Raises:
            ValueError: if a field that the method needs is missing from ``inputs``; the message names it.
            TypeError, ValueError: if `choose` returned something else than it promises; names the method.
        """
        views, tokens = inputs.features.shape[:2]
        keep = self.count(tokens) if keep is None else keep
        if keep >= tokens:
            everything = torch.arange(tokens, device=inputs.features.device)
            return Selection(everything.expand(views, -1), tokens)
        missing = self.lacking(inputs)
        if missing:
            raise ValueError(f"pruner '{self.name}' needs {', '.join(missing)}, which this host did not give")
        self._check_floor(keep)
        with without_autocast():
            return self._select(inputs, keep)

    def _select(self, inputs: PruningInputs, keep: int) -> Selection:
        indices, details = checked(self, inputs, keep, self.choose(inputs, keep))
        return Selection(indices, inputs.tokens, self.eligible(inputs, indices, details), details)

    @abstractmethod
    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The method itself.

        Returns:
            ``keep`` < n distinct, ascending indices (B, keep) int64, and what led to them: tensors (B, ...) by name.
            Tokens that are not ``inputs.valid`` may only fill places that valid ones cannot.
        """

    def eligible(self, inputs: PruningInputs, indices: Tensor, details: Mapping[str, Tensor]) -> Tensor | None:
        """(B, m) bool, which of the chosen ``indices`` count as kept; ``None`` means all."""
        return None if inputs.valid is None else inputs.valid.gather(1, indices)


@dataclass(frozen=True, kw_only=True)
class Pruner(ViewMethod):
    """Base of the methods that keep some of the tokens as they are.

    Args:
        scope: which tokens compete with each other. "view": those of each view; "global": those of all views of a
            picture or video.
        per: what ``keep_tokens`` is for, a "view" or a "picture". With scope "global" and per "view" the budget is
            that of all views together. With scope "view" and per "picture" every view has a share of the budget in
            proportion to its tokens, whole numbers that add up to it.
    """

    scope: Literal["view", "global"] = "view"
    per: Literal["view", "picture"] = "view"


@dataclass(frozen=True, kw_only=True)
class TokenMaker(ViewMethod):
    """Base of the methods that also make tokens of their own, which no patch has; their budget is that of a view."""

    makes_tokens: ClassVar[bool] = True

    @abstractmethod
    def count_made(self, keep: int) -> int:
        """How many of a view's ``keep`` tokens the method makes itself."""

    @abstractmethod
    def make(self, inputs: PruningInputs, kept: Selection, count: int) -> Selection:
        """Add ``count`` tokens per view of the method's own to those kept: see `Selection.made`."""

    def kept_and_made(self, keep: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        patches = eligible.sum(-1)
        made = self.count_made(keep)
        kept = patches.clamp_max(keep - made)
        return kept, (patches - kept).clamp_max(made)

    def _select(self, inputs: PruningInputs, keep: int) -> Selection:
        made = self.count_made(keep)
        selection = super()._select(inputs, keep - made)
        return self.make(inputs, selection, made) if made else selection


def checked(method: ViewMethod, inputs: PruningInputs, keep: int, answer: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What `choose` returned, if it is what `choose` promises. Values are looked at on a CPU, where nothing waits.

    Raises:
        TypeError: not a pair of a tensor and a mapping.
        ValueError: indices of another shape or dtype, not ascending, out of range, or of tokens that must not be
            chosen while others are left.
    """
    promised = f"pruner '{method.name}': choose must return (indices (B, {keep}) int64, details)"
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise TypeError(f"{promised}, got {type(answer).__name__}")
    indices, details = answer
    if not isinstance(indices, Tensor) or not isinstance(details, Mapping):
        raise TypeError(f"{promised}, got ({type(indices).__name__}, {type(details).__name__})")
    if tuple(indices.shape) != (inputs.views, keep) or indices.dtype != torch.int64:
        raise ValueError(f"{promised}, B = {inputs.views}; got {tuple(indices.shape)} {indices.dtype}")
    if indices.device.type == "cpu" and indices.numel():
        if int(indices.min()) < 0 or int(indices.max()) >= inputs.tokens:
            raise ValueError(
                f"{promised} from 0 to {inputs.tokens - 1}; got {int(indices.min())} to {int(indices.max())}"
            )
        if not bool((indices.diff(dim=1) > 0).all()):
            raise ValueError(f"{promised}, distinct and ascending in every row; these are not")
        if inputs.valid is not None:
            valid = inputs.valid.to(indices.device)
            if bool((valid.gather(1, indices).sum(-1) < valid.sum(-1).clamp_max(keep)).any()):
                raise ValueError(f"{promised} of inputs.valid tokens while there are any left; others were chosen")
    return indices, details


def keep_none(inputs: PruningInputs) -> Tensor:
    """Indices (B, 0): what a method chooses that makes all of its tokens."""
    return torch.empty(inputs.views, 0, dtype=torch.int64, device=inputs.features.device)


# --- registry ------------------------------------------------------------------------------------------------------


def register(cls: type[Method]) -> type[Method]:
    """Class decorator that makes a method known under its ``name``."""
    if cls.name in _REGISTRY:
        raise ValueError(f"two pruners are called '{cls.name}'")
    _REGISTRY[cls.name] = cls
    return cls


def list_pruners() -> list[str]:
    """Names of all methods, in alphabetical order."""
    return sorted(_REGISTRY)


def pruner_class(name: str) -> type[Method]:
    """The class of a method. Raises ValueError with the valid names."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown pruner {name!r}; known pruners: {', '.join(list_pruners())}")
    return _REGISTRY[name]


def get_pruner(name: str, **options: Any) -> Method:
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


def parse_options(name: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``["tau=0.3", "gsp=false"]`` into typed options of the pruner ``name``. Raises ValueError."""
    return parse_assignments(pruner_class(name), assignments)
