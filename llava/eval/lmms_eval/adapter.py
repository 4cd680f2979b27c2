"""What our models of the harness share: its interface, batches, answers kept through a kill, accounting.

A model's room says how a checkpoint is loaded and a batch of conversations answered (`PrunedModel.load`, `respond`);
everything else is here. The harness's own names (``lmms``, ``rank``, ``device``) are met where it looks for them.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from llava.eval.lmms_eval.answers import Answer, AnswerBook, summarise
from llava.eval.lmms_eval.arguments import ModelArguments, read_arguments
from llava.eval.lmms_eval.requests import Asked, Decoding, Message, UnreadableVisual, Visual, read_request

logger = logging.getLogger(__name__)


class PrunedModel(lmms):
    """A model of the harness with a pruner inside.

    ``is_simple``, which the harness reads, also says here which form of request comes in.

    Raises:
        ValueError: a model argument is unknown or wrong; before anything is loaded.
    """

    Arguments: ClassVar[type[ModelArguments]] = ModelArguments

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.arguments = read_arguments(self.Arguments, given)
        self.pruner = self.arguments.make_pruner()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._device = _device_of(self.arguments.device)
        folder = Path(self.arguments.answers) if self.arguments.answers else None
        self.book = AnswerBook(folder, self.settings(), self._rank)
        self.used: set[str] = set()  # keys of the questions of this run
        self.load()

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self.arguments.batch_size

    # --- what a model's room fills in ------------------------------------------------------------------------------

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that can change an answer, as values of JSON; asked for before `load`."""

    @abstractmethod
    def load(self) -> None:
        """Load the checkpoint onto ``device``."""

    @abstractmethod
    def read_visual(self, visual: Visual) -> Any:
        """Decode an image or a video. Raises OSError or ValueError."""

    @abstractmethod
    def respond(self, batch: Sequence[tuple[Asked, list[Message], list[Any]]], decoding: Decoding) -> list[Answer]:
        """Answer conversations, each with its decoded visuals in order; texts need not be cut yet."""

    # --- what the harness calls ------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; a question that an earlier run answered is not put again.

        Raises:
            UnreadableVisual: a visual cannot be read, unless ``on_error=skip``.
            SystemExit: any error, in one of several processes. The harness catches exceptions and goes on to its end,
                while the other processes would wait for this one for hours.
        """
        try:
            return self._generate(requests)
        except Exception as error:
            if self.world_size == 1:
                raise
            traceback.print_exc()
            raise SystemExit(f"process {self.rank}: {error}") from error

    def _generate(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        asked = self._numbered(requests)
        pending = {question.key: question for question in asked if question.key not in self.book.answers}
        self.used.update(question.key for question in asked)
        if self.arguments.on_error == "stop":
            self._check_files(pending.values())
        bar = tqdm(total=len(pending), unit="question", disable=self.rank != 0)
        for batch in self._batches(pending.values()):
            self._answer(batch)
            bar.update(len(batch))
        bar.close()
        return [_result(self.book.answers[question.key]) for question in asked]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the tasks that these models are for all generate."""
        raise NotImplementedError(f"{type(self).__name__} generates answers; this task asks for log-likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: what is asked next depends on the task's code in the middle of a batch."""
        raise NotImplementedError(f"{type(self).__name__} answers single rounds; this task has several")

    def clean(self) -> None:
        """The harness's call after all answers, in every process: sum up, then free the model's memory."""
        own = {key: (*self.book.places[key], self.book.answers[key]) for key in self.used}
        shares = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, own)
        if self.rank == 0:
            self._sum_up({key: answer for share in shares for key, answer in share.items()})
        super().clean()

    def _sum_up(self, answers: Mapping[str, tuple[str, int, Answer]]) -> None:
        """Into the harness's result file under ``throughput``, and into the answers' folder by task."""
        summary = summarise(answers)
        self.book.write_summary(summary)
        total = next(iter(summarise({key: ("all", *rest) for key, (_, *rest) in answers.items()}).values()), None)
        if total is None:
            return
        unreadable = total.pop("unreadable")
        seconds, tokens = total.pop("model_seconds"), total.pop("new_tokens")
        total["unreadable_questions"] = len(unreadable)
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, additional_metrics=total)
        for task, own in summary.items():
            for item in own["unreadable"]:
                logger.error("%s, document %s was not put: %s", task, item["document"], item["reason"])
        if unreadable:
            logger.error(
                "%d of %d questions were not put because a visual cannot be read: the harness scores their empty "
                "answers",
                len(unreadable),
                len(answers),
            )

    # --- between the two -------------------------------------------------------------------------------------------

    def _numbered(self, requests: Sequence[Instance]) -> list[Asked]:
        """The questions, repetitions told apart. Copies that only pad a process's share are no repetitions."""
        seen: Counter[str] = Counter()
        asked = []
        for request in requests:
            question = read_request(request.args, is_chat=not self.is_simple)
            padding = bool((request.metadata or {}).get("__padding_only__"))
            number = 0 if padding else seen[question.key]
            seen[question.key] += not padding
            asked.append(read_request(request.args, not self.is_simple, number) if number else question)
        return asked

    def _check_files(self, questions: Sequence[Asked]) -> None:
        """Look for the files of all documents of tasks that name files, before the model starts on the first one."""
        by_task: dict[str, list[Asked]] = {}
        for question in questions:
            by_task.setdefault(question.task, []).append(question)
        for own in by_task.values():
            for question in own:
                visuals = self._open(question)
                files = [visual.content for visual in visuals if isinstance(visual.content, str)]
                missing = [
                    file for file in files if not file.startswith(("http:", "https:")) and not Path(file).exists()
                ]
                if missing:
                    raise UnreadableVisual(f"{_place(question)}: there is no file or folder {missing[0]}")
                if not files:
                    break  # pictures are in the data set itself: decoding all of them twice would be dear

    def _open(self, question: Asked) -> list[Visual]:
        try:
            return [visual for message in question.open(self.task_dict) for visual in message.visuals]
        except UnreadableVisual as error:
            raise UnreadableVisual(f"{_place(question)}: {error}") from error

    def _batches(self, questions: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Questions that are decoded alike, ``batch_size`` at a time, in order."""
        groups: dict[Decoding, list[Asked]] = {}
        for question in questions:
            groups.setdefault(question.decoding, []).append(question)
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                yield group[first : first + self.batch_size]

    def _answer(self, batch: Sequence[Asked]) -> None:
        """Put a batch of questions and keep the answers."""
        ready, entries = [], []
        for question in batch:
            try:
                messages = question.open(self.task_dict)
                visuals = [self.read_visual(visual) for message in messages for visual in message.visuals]
            except (OSError, ValueError) as error:
                if self.arguments.on_error == "stop":
                    raise UnreadableVisual(f"{_place(question)}: {error}; on_error=skip leaves it out") from error
                answer = Answer("", unreadable=str(error))
                entries.append((question.key, question.task, question.document, answer))
                continue
            ready.append((question, messages, visuals))
        if ready:
            decoding = batch[0].decoding
            start = time.perf_counter()
            answers = self.respond(ready, decoding)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = (time.perf_counter() - start) / len(ready)
            for (question, _, _), answer in zip(ready, answers, strict=True):
                fields = {**vars(answer), "text": decoding.cut(answer.text).strip(), "seconds": seconds}
                entries.append((question.key, question.task, question.document, Answer(**fields)))
        self.book.append(entries)


def _place(question: Asked) -> str:
    return f"task {question.task}, document {question.document}"


def _result(answer: Answer) -> GenerationResult:
    counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens)
    return GenerationResult(answer.text, counts)


def _device_of(device: str) -> torch.device:
    """The device of this process. Raises ValueError for CUDA without a GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no GPU")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(device)
