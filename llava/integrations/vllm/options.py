"""What a server and a request may say about pruning, and the plan for a picture that follows from it.

Three places speak, the later over the earlier: ``script_pruning`` in ``--hf-overrides``, the server's
``--mm-processor-kwargs``, the request's ``mm_processor_kwargs``. No import of vLLM: a plan is made in the front end,
travels beside the pixels, and is read in the worker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from llava.pruning import Pruner, get_pruner, list_pruners
from llava.relevance.question import QUERY_SCOPES

JOINT_FIELDS = frozenset({"image_embeds", "text_embeds"})
LANGUAGE_FIELDS = frozenset({"query_embeds"})


def host_fields(has_clip: bool) -> frozenset[str]:
    """Fields of `PruningInputs` that a model in vLLM gives; without CLIP, relevance stands for the joint space."""
    return JOINT_FIELDS | LANGUAGE_FIELDS | ({"encoder_features"} if has_clip else set())


@dataclass(frozen=True)
class ServerOptions:
    """What only whoever starts the server decides (``script_pruning`` in ``--hf-overrides``).

    Args:
        clip: folder or hub name of the CLIP that the vision tower was taken from; ``None`` takes ``mm_vision_tower``
            of the model's configuration, where it has one.
        relevance_sign: sign of CLIP's cosine; ``None`` takes ``mm_relevance_sign`` of the configuration, else -1.
        views_at_once: views that go through the tower together. vLLM's encoder budget counts kept tokens, the tower's
            work is all of them: this bounds its memory.
        feature_cache_mib: MiB of host memory, in each worker, for unpruned features, so that many questions about one
            picture run the tower once; 0 switches the cache off.
    """

    clip: str | None = None
    relevance_sign: int | None = None
    views_at_once: int = 16
    feature_cache_mib: int = 512

    def __post_init__(self):
        if self.relevance_sign not in (None, -1, 1):
            raise ValueError(f"relevance_sign must be -1 or 1, got {self.relevance_sign!r}")
        for name, least in (("views_at_once", 1), ("feature_cache_mib", 0)):
            if not is_count(getattr(self, name), least):
                raise ValueError(f"{name} must be an integer from {least}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class PruningOptions:
    """What a server sets and a request may change.

    Args:
        keep_tokens: visual tokens of each view (tile, frame or picture), exactly.
        image_pruning_rate: share of a view's tokens that is removed, 0 <= rate < 1, where ``keep_tokens`` is not
            given at the same place; vLLM's own meaning of "rate".
        image_pruning_method: name of a pruner.
        image_pruning_args: its further options.
        query: the question, instead of the one in the prompt.
        query_scope: "image_turn" reads the user's turn that a picture stands in, and keeps all caches warm over a
            conversation; "latest_turn" reads the last question, and encodes the picture anew for each.
        min_visual_tokens: never fewer tokens of a view than this.
        max_keep_tokens: the most that a request may ask for; ``None``: what the server itself keeps. Server only.
    """

    keep_tokens: int | None = None
    image_pruning_rate: float | None = None
    image_pruning_method: str = "script"
    image_pruning_args: Mapping[str, Any] = field(default_factory=dict)
    query: str | None = None
    query_scope: str = "image_turn"
    min_visual_tokens: int = 1
    max_keep_tokens: int | None = None

    def __post_init__(self):
        for name in ("keep_tokens", "max_keep_tokens", "min_visual_tokens"):
            value = getattr(self, name)
            if not (value is None and name != "min_visual_tokens") and not is_count(value, 1):
                raise ValueError(f"{name} must be an integer from 1, got {value!r}")
        rate = self.image_pruning_rate
        if rate is not None and not (isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate < 1):
            raise ValueError(f"image_pruning_rate is the share removed: from 0 up to, not including, 1; got {rate!r}")
        if self.image_pruning_method not in list_pruners():
            raise ValueError(
                f"unknown image_pruning_method {self.image_pruning_method!r}; known: {', '.join(list_pruners())}"
            )
        if not isinstance(self.image_pruning_args, Mapping):
            raise ValueError(f"image_pruning_args must be a table of options, got {self.image_pruning_args!r}")
        if self.query is not None and not isinstance(self.query, str):
            raise ValueError(f"query must be text, got {self.query!r}")
        if self.query_scope not in QUERY_SCOPES:
            raise ValueError(f"query_scope must be one of {', '.join(QUERY_SCOPES)}; got {self.query_scope!r}")

    def changed_by(self, values: Mapping[str, Any]) -> PruningOptions:
        """These options with those of a later place over them; either way to give a budget replaces the other."""
        values = {name: value for name, value in values.items() if name in OPTION_NAMES}
        if values.get("keep_tokens") is not None:
            values["image_pruning_rate"] = None
        elif values.get("image_pruning_rate") is not None:
            values["keep_tokens"] = None
        if values.get("image_pruning_method", self.image_pruning_method) != self.image_pruning_method:
            values.setdefault("image_pruning_args", {})  # another method's options mean nothing to this one
        return dataclasses.replace(self, **values)

    @property
    def prunes(self) -> bool:
        """Whether a budget is given at all."""
        return self.keep_tokens is not None or self.image_pruning_rate is not None

    def count(self, tokens: int) -> int:
        """How many of a view's ``tokens`` go on: all of them where no budget is given."""
        if self.keep_tokens is not None:
            asked = self.keep_tokens
        elif self.image_pruning_rate is not None:
            asked = int(tokens * (1 - self.image_pruning_rate) + 0.5)
        else:
            asked = tokens
        return min(max(asked, self.min_visual_tokens), tokens)

    def most(self, tokens: int) -> int:
        """The most tokens of a view that a request to this server may keep."""
        return self.count(tokens) if self.max_keep_tokens is None else min(self.max_keep_tokens, tokens)

    def check_request(self, request: PruningOptions, tokens: int) -> None:
        """Raise ValueError if a request asks for more of a view than this server has reserved."""
        asked, most = request.count(tokens), self.most(tokens)
        if asked > most:
            raise ValueError(
                f"this request keeps {asked} visual tokens of a view of {tokens}, but the server allows {most}: ask "
                "for fewer, or start the server with a larger max_keep_tokens in script_pruning"
            )

    def pruner(self, host_fields: frozenset[str]) -> Pruner:
        """The method, which must do with ``features`` and the ``host_fields`` of `PruningInputs`.

        Raises:
            ValueError: an unknown option of the method, or a method that this host cannot run; lists those it can.
        """
        return make_pruner(self.image_pruning_method, json.dumps(dict(self.image_pruning_args)), host_fields)


OPTION_NAMES = frozenset(option.name for option in dataclasses.fields(PruningOptions))
SERVER_NAMES = frozenset(option.name for option in dataclasses.fields(ServerOptions))


def is_count(value: Any, least: int) -> bool:
    """Whether ``value`` is an integer, and no bool, from ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def read_server_options(
    overrides: Any, processor_kwargs: Mapping[str, Any] | None
) -> tuple[ServerOptions, PruningOptions]:
    """Options of the server from ``script_pruning`` and its ``--mm-processor-kwargs``.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise ValueError(f"script_pruning must be a table of options, got {overrides!r}")
    unknown = sorted(set(overrides) - OPTION_NAMES - SERVER_NAMES)
    if unknown:
        valid = ", ".join(sorted(OPTION_NAMES | SERVER_NAMES))
        raise ValueError(f"script_pruning has no option {', '.join(unknown)}; its options: {valid}")
    server = ServerOptions(**{name: value for name, value in overrides.items() if name in SERVER_NAMES})
    return server, PruningOptions().changed_by(overrides).changed_by(processor_kwargs or {})


def read_request_options(server: PruningOptions, processor_kwargs: Mapping[str, Any]) -> PruningOptions:
    """Options of a request on top of the server's. Raises ValueError for a value out of range."""
    if "max_keep_tokens" in processor_kwargs:
        raise ValueError("max_keep_tokens is the server's to set: start it with script_pruning in --hf-overrides")
    return server.changed_by(processor_kwargs)


@lru_cache(maxsize=256)
def make_pruner(method: str, arguments: str, host_fields: frozenset[str]) -> Pruner:
    """A pruner whose needs the host can meet. Its own ``keep_tokens`` is not used: the count is the plan's."""
    options = json.loads(arguments)
    fixed = sorted(set(options) & {"keep_tokens", "newlines", "scope", "exclude_padding"})
    if fixed:
        raise ValueError(f"image_pruning_args cannot set {', '.join(fixed)}: the server decides")
    pruner = get_pruner(method, **options)
    reason = cannot_run(pruner, host_fields)
    if reason is not None:
        able = [name for name in list_pruners() if cannot_run(get_pruner(name), host_fields) is None]
        raise ValueError(
            f"image_pruning_method {method!r} {reason} here; methods that can be served: {', '.join(able)}"
        )
    return pruner


def cannot_run(pruner: Pruner, host_fields: frozenset[str]) -> str | None:
    """Why a host that gives ``host_fields`` cannot run a method; ``None`` if it can."""
    if pruner.place in ("pixels", "decoder"):
        return f"acts on the {pruner.place}, which cannot be done"
    if pruner.makes_tokens or not pruner.count_is_exact:
        return "does not keep an exact number of the picture's own tokens, and cannot be served"
    missing = sorted(pruner.needs - host_fields)
    return f"needs {', '.join(missing)}, which cannot be had" if missing else None


@dataclass(frozen=True)
class PicturePlan:
    """All that decides which tokens of one picture go on: its digest is the picture's identity in every cache.

    Args:
        picture: hash of the picture and of the arguments of its preprocessing, as vLLM computes it.
        keep_tokens, rate, least: the budget, as in `PruningOptions`.
        method, arguments: the pruner and its options as JSON.
        query: the question; ``None`` where the method does not read it, so that all questions share the picture.
        query_ids: its tokens in the language model's vocabulary, where the method needs them.
    """

    picture: str
    keep_tokens: int | None
    rate: float | None
    least: int
    method: str
    arguments: str
    query: str | None = None
    query_ids: tuple[int, ...] = ()

    @property
    def budget(self) -> PruningOptions:
        return PruningOptions(self.keep_tokens, self.rate, min_visual_tokens=self.least)

    def count(self, tokens: int) -> int:
        """How many of a view's ``tokens`` go on."""
        return self.budget.count(tokens)

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> PicturePlan:
        values = json.loads(data)
        return cls(**{**values, "query_ids": tuple(values["query_ids"])})

    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()
