"""Where relevance comes from: one rule for every host.

A host says what it can give (`Offer`); `settle` takes the source that a method asks for, or the best there is, and
says in a sentence which and why. "projector" is never taken by itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from llava.pruning import Method
from llava.pruning.question_reader import QuestionReader, Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offer:
    """What a host can give. A text says why it cannot, and what would help; ``None`` that it can.

    Args:
        no_joint_space: for "clip".
        no_words: for every source that reads the language model: no tokenizer for the question.
        no_attention: for "qk" and "hawk", and the second half of "language".
        joint_space: what the joint space is called in messages.
    """

    no_joint_space: str | None = None
    no_words: str | None = None
    no_attention: str | None = None
    joint_space: str = "the vision tower's CLIP"

    def why_not(self, source: Source) -> str | None:
        """Why a source cannot be had; ``None`` if it can."""
        if source == "clip":
            return self.no_joint_space
        if source in ("qk", "hawk"):
            return self.no_words or self.no_attention
        return self.no_words if source in ("language", "words", "projector") else None


@dataclass(frozen=True)
class Choice:
    """The source that was taken, and why, in one sentence that a user is told.

    Args:
        substitute: "auto" would rather have had another.
    """

    source: Source
    reason: str
    substitute: bool = False

    def __str__(self) -> str:
        return f"relevance={self.source}: {self.reason}"


def settle(method: Method, offer: Offer) -> tuple[Method, Choice | None]:
    """A method with its source of relevance settled, and the choice; the method itself if it reads no question.

    Raises:
        ValueError: the source cannot be had: what is missing, and which others work. Or an option of the method
            belongs to another source than the one that is taken.
    """
    if not isinstance(method, QuestionReader) or not method.reads_question:
        return method, None
    asked = method.relevance
    source = asked
    if asked == "auto":
        source = "clip" if offer.no_joint_space is None else "language"
    reason = offer.why_not(source)
    if reason is not None:
        others = [other for other in method.sources if other not in ("auto", "none") and not offer.why_not(other)]
        work = f"here work relevance={', '.join([*others, 'none'])}"
        if asked == "auto":
            reason = f"{offer.no_joint_space}; {reason}"
        raise ValueError(f"pruner '{method.name}' cannot have relevance={asked}: {reason}. Instead, {work}")
    words_alone = source == "language" and offer.no_attention is not None
    if method.heads is not None and words_alone:
        raise ValueError(f"heads={method.heads} weighs an attention that cannot be read: {offer.no_attention}")
    try:
        settled = method.from_source(source)
    except ValueError as error:
        raise ValueError(
            f"pruner '{method.name}' took relevance={source} ({offer.no_joint_space}), but {error}"
        ) from None
    substitute = asked == "auto" and (source != "clip" or words_alone)
    return settled, Choice(source, _reason(asked, source, offer, words_alone), substitute)


def _reason(asked: Source, source: Source, offer: Offer, words_alone: bool) -> str:
    if source == "clip":
        return f"read in the joint space of {offer.joint_space}"
    parts = {
        "language": "read in the language model's embeddings and first attention",
        "qk": "read in the language model's first attention",
        "hawk": "read in the products of the language model's first attention",
        "words": "read in the language model's embeddings",
        "projector": "the cosine with the question's embeddings, a weak signal",
    }
    text = parts[source]
    if words_alone:
        text = f"read in the language model's embeddings alone, because {offer.no_attention}"
    return f"{text}; {offer.no_joint_space}" if asked == "auto" else text


class Announcer:
    """Tells each choice once in the log, whatever number of calls take it; aloud if "auto" took a substitute."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def tell(self, method: Method, choice: Choice | None) -> None:
        if choice is None or (method.name, str(choice)) in self._told:
            return
        self._told.add((method.name, str(choice)))
        level = logging.WARNING if choice.substitute else logging.INFO
        logger.log(level, "pruner '%s' reads the question with %s", method.name, choice)
