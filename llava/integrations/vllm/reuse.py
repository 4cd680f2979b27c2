"""Pictures that many questions are asked about: when their tokens are chosen without the question.

A selection for one question is of no use to the next: the language model reads the picture anew each time, where an
unpruned server finds it in its prefix cache. Chosen without the question the kept tokens are the same for all
questions, and are found there too.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable

from llava.integrations.vllm.options import PruningOptions
from llava.pruning import Method
from llava.pruning.question_reader import QuestionReader

REMEMBERED_PICTURES = 4096
ABOUT_RELEVANCE = ("relevance", "relevance_sign", "heads")  # options that mean nothing without a question


def without_question(options: PruningOptions, method: Method) -> PruningOptions:
    """Options by which a method chooses the same tokens whatever is asked.

    Raises:
        ValueError: the method always reads the question.
    """
    if not method.reads_question:
        return options
    if not isinstance(method, QuestionReader) or "none" not in method.sources:
        raise ValueError(
            f"reuse shares a picture's tokens over questions, but pruner '{method.name}' chooses by the question "
            "alone: take reuse=none, or a method that has relevance=none or reads no question"
        )
    arguments = {name: value for name, value in options.image_pruning_args.items() if name not in ABOUT_RELEVANCE}
    return dataclasses.replace(options, image_pruning_args={**arguments, "relevance": "none"})


class HotPictures:
    """Which pictures are hot: asked about with ``after`` different questions within the last ``seconds``.

    Of `REMEMBERED_PICTURES` at most, the most recently asked about, and of as many questions each as make it hot.
    """

    def __init__(self, after: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.after, self.seconds, self.clock = after, seconds, clock
        self._asked: OrderedDict[str, OrderedDict[str, float]] = OrderedDict()

    def ask(self, picture: str, question: str) -> bool:
        """Note a question about a picture, and tell whether the picture is hot, this question among the others."""
        now = self.clock()
        questions = self._asked.setdefault(picture, OrderedDict())
        self._asked.move_to_end(picture)
        questions[question] = now
        questions.move_to_end(question)
        while len(questions) > self.after or now - next(iter(questions.values())) > self.seconds:
            questions.popitem(last=False)
        while len(self._asked) > REMEMBERED_PICTURES:
            self._asked.popitem(last=False)
        return len(questions) >= self.after
