"""What a server and a request may say about pruning, each value checked where it is read.

Three places speak, the later over the earlier: ``script_pruning`` in ``--hf-overrides``, the server's
``--mm-processor-kwargs``, the request's ``mm_processor_kwargs``. No import of vLLM: options are read in the front end,
which answers 400 to a bad one; what reaches a worker (plan.py) has passed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from llava.pruning import list_pruners
from llava.pruning.auto_budget import is_auto
from llava.pruning.options import Count, Positive, Range, check_value, option_types
from llava.relevance.question import QUERY_SCOPES, QueryScope

LONGEST_QUESTION = 4096  # characters; also what is read of a prompt's turn
LONGEST_MESSAGE = 1000  # of a refusal, which repeats what the client sent


class OverBudgetError(ValueError):
    """A request asks for more tokens of a picture than the server has reserved."""


@dataclass(frozen=True)
class ServerOptions:
    """What only whoever starts the server decides (``script_pruning`` in ``--hf-overrides``).

    Args:
        clip: folder or hub name of the CLIP that the vision tower was taken from; ``None`` takes ``mm_vision_tower``
            of the model's configuration, where it has one, or one that is known by its shape and at hand.
        relevance_sign: sign of CLIP's cosine; ``None`` takes ``mm_relevance_sign`` of the configuration, else -1.
        views_at_once: views that go through the tower together. vLLM's encoder budget counts kept tokens, the tower's
            work is all of them: this bounds its memory.
        feature_cache_mib: MiB of host memory, in each worker, for unpruned features, so that many questions about one
            picture run the tower once; 0 switches the cache off.
        reuse_after, reuse_seconds: with ``reuse="auto"``, a picture's tokens are shared over questions while it has
            been asked about with so many different questions within so many seconds, as each front end counts them.
    """

    clip: str | None = None
    relevance_sign: Literal[-1, 1] | None = None
    views_at_once: Count = 16
    feature_cache_mib: Annotated[int, Range(0, 2**20)] = 512
    reuse_after: Count = 4
    reuse_seconds: Positive = 600.0

    def __post_init__(self):
        for name, kind in option_types(type(self)).items():
            check_value(name, getattr(self, name), kind)


@dataclass(frozen=True)
class PruningOptions:
    """What a server sets and a request may change.

    Args:
        keep_tokens: visual tokens of each view (tile, frame or picture), exactly; of each picture or video with
            ``keep_per="picture"``.
        keep_per: what the budget is for. "view": each view has its own; "picture": all views of a picture or video
            share one, in proportion to the tokens that they have beside padding.
        image_pruning_rate: share of the tokens that is removed, 0 <= rate < 1, where ``keep_tokens`` is not
            given at the same place; vLLM's own meaning of "rate".
        image_pruning_method: name of a pruner.
        image_pruning_args: its further options.
        query: the question, instead of the one in the prompt; at most `LONGEST_QUESTION` characters.
        query_scope: "image_turn" reads the user's turn that a picture stands in, and keeps all caches warm over a
            conversation; "latest_turn" reads the last question, and encodes the picture anew for each.
        min_visual_tokens: never fewer tokens than this, of what ``keep_per`` says.
        reuse: "none" chooses the tokens of a picture for each question; "picture" chooses them without the question,
            once for all, so that they are found in every cache; "auto" begins with the first and takes the second
            while a picture is asked about often (`ServerOptions.reuse_after`).
        max_keep_tokens: the most that a request may ask for, counted as ``keep_tokens``; ``None``: what the server
            itself keeps. Server only.
    """

    keep_tokens: Count | None = None
    image_pruning_rate: float | None = None
    image_pruning_method: str = "script"
    image_pruning_args: Mapping[str, Any] = field(default_factory=dict)
    query: str | None = None
    query_scope: QueryScope = "image_turn"
    min_visual_tokens: Count = 1
    max_keep_tokens: Count | None = None
    keep_per: Literal["view", "picture"] = "view"
    reuse: Literal["none", "picture", "auto"] = "none"

    def __post_init__(self):
        kinds = option_types(type(self))
        if is_auto(self.keep_tokens):
            raise ValueError(
                f"keep_tokens={self.keep_tokens} cannot be served: vLLM lays out the prompt before the picture is "
                "encoded, and must know by then how many tokens it takes; give a count, or image_pruning_rate"
            )
        for name in (
            "keep_tokens",
            "max_keep_tokens",
            "min_visual_tokens",
            "keep_per",
            "reuse",
            "image_pruning_method",
        ):
            check_value(name, getattr(self, name), kinds[name])
        rate = self.image_pruning_rate
        check_value("image_pruning_rate", rate, kinds["image_pruning_rate"])
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"image_pruning_rate is the share removed: from 0 up to, not including, 1; got {rate!r}")
        if self.image_pruning_method not in list_pruners():
            raise ValueError(
                f"unknown image_pruning_method {self.image_pruning_method!r}; known: {', '.join(list_pruners())}"
            )
        if not isinstance(self.image_pruning_args, Mapping):
            raise ValueError(f"image_pruning_args must be a table of options, got {self.image_pruning_args!r}")
        check_value("query", self.query, kinds["query"])
        if self.query is not None:
            check_text("query", self.query)
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
        """The budget for what ``keep_per`` says: a view of ``tokens``, or a picture with as many in all its views.

        All of them where no budget is given.
        """
        if self.keep_tokens is not None:
            asked = self.keep_tokens
        elif self.image_pruning_rate is not None:
            asked = int(tokens * (1 - self.image_pruning_rate) + 0.5)
        else:
            asked = tokens
        return min(max(asked, self.min_visual_tokens), tokens)

    def count_picture(self, views: int, tokens: int) -> int:
        """The most tokens that a picture with ``views`` of ``tokens`` each keeps."""
        if self.keep_per == "picture":
            return self.count(views * tokens)
        return views * self.count(tokens)

    def most(self, views: int, tokens: int) -> int:
        """The most tokens of such a picture that a request to this server may keep."""
        if self.max_keep_tokens is None:
            return self.count_picture(views, tokens)
        return min(self.max_keep_tokens * (1 if self.keep_per == "picture" else views), views * tokens)

    def check_request(self, request: PruningOptions, views: int, tokens: int) -> None:
        """Raise OverBudgetError if a request asks for more of a picture than this server has reserved."""
        asked, most = request.count_picture(views, tokens), self.most(views, tokens)
        if asked <= most:
            return
        of = f"a picture of {views * tokens}"
        if self.keep_per == request.keep_per == "view":
            asked, most, of = asked // views, most // views, f"a view of {tokens}"
        raise OverBudgetError(
            f"this request keeps {asked} visual tokens of {of}, but the server allows {most}: ask "
            "for fewer, or start the server with a larger max_keep_tokens in script_pruning"
        )


OPTION_NAMES = frozenset(option.name for option in dataclasses.fields(PruningOptions))
SERVER_NAMES = frozenset(option.name for option in dataclasses.fields(ServerOptions))
REQUEST_NAMES = OPTION_NAMES - {"max_keep_tokens"}


def check_text(name: str, text: str) -> None:
    """Raise ValueError for a text that is too long, or that holds half of a surrogate pair and is no Unicode."""
    if len(text) > LONGEST_QUESTION:
        raise ValueError(f"{name} may have {LONGEST_QUESTION} characters, this one has {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise ValueError(f"{name} is no valid Unicode: {found!r} at {error.start} is half of a character") from None


def check_names(given: Iterable[Any], valid: Iterable[str], what: str) -> None:
    """Raise ValueError for a name that is not valid, with the nearest that is, and all."""
    valid = sorted(valid)
    for name in given:
        if name in valid:
            continue
        near = difflib.get_close_matches(str(name), valid, n=1)
        nearest = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"{what} has no option {str(name)[:80]!r}{nearest} Its options: {', '.join(valid)}")


def read_server_options(
    overrides: Any, processor_kwargs: Mapping[str, Any] | None
) -> tuple[ServerOptions, PruningOptions]:
    """Options of the server from ``script_pruning`` and its ``--mm-processor-kwargs``.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    overrides = {} if overrides is None else overrides
    processor_kwargs = processor_kwargs or {}
    if not isinstance(overrides, Mapping):
        raise ValueError(f"script_pruning must be a table of options, got {overrides!r}")
    check_names(overrides, OPTION_NAMES | SERVER_NAMES, "script_pruning")
    for name in processor_kwargs:  # the picture processor's options stand there as well
        near = difflib.get_close_matches(str(name), OPTION_NAMES, n=1, cutoff=0.85)
        if near and name not in OPTION_NAMES:
            raise ValueError(f"--mm-processor-kwargs has {name!r}, which is no option; did you mean {near[0]}?")
    server = ServerOptions(**{name: value for name, value in overrides.items() if name in SERVER_NAMES})
    return server, PruningOptions().changed_by(overrides).changed_by(processor_kwargs)


def read_request_options(server: PruningOptions, processor_kwargs: Mapping[str, Any]) -> PruningOptions:
    """Options of a request on top of the server's.

    Raises:
        ValueError: an unknown name, one of the server's, or a value out of range; in few words whatever was sent.
    """
    own = sorted((set(processor_kwargs) & SERVER_NAMES) | (set(processor_kwargs) & {"max_keep_tokens"}))
    if own:
        raise ValueError(f"{', '.join(own)}: the server's to set, with script_pruning in --hf-overrides")
    check_names(processor_kwargs, REQUEST_NAMES, "mm_processor_kwargs of a pruned model")
    arguments = processor_kwargs.get("image_pruning_args")
    if isinstance(arguments, Mapping) and "heads" in arguments:
        raise ValueError("heads names a file: the server's to set, in image_pruning_args of script_pruning")
    return server.changed_by(processor_kwargs)


def in_few_words(error: ValueError) -> str:
    """The message of a refusal as text that any client can be sent, not longer than `LONGEST_MESSAGE`."""
    text = str(error).encode(errors="backslashreplace").decode()
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."
