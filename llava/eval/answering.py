"""Questions in, answers out: pictures prepared ahead by workers, prompts batched, greedy decoding."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import clean_question, conv_templates
from llava.eval.benchmarks import Question
from llava.eval.cost import prefill_flops
from llava.mm_utils import load_image, load_image_from_base64, process_images, tokenizer_image_token
from llava.model.kept_tokens import KeptTokens
from llava.pruning import Pruner

AHEAD_BATCHES = 3  # prepared beyond the one that the model is at


class BrokenQuestion(ValueError):
    """A question cannot be asked: its picture is missing or damaged; the message names the question."""


@dataclass(frozen=True)
class Prepared:
    """A question as the model takes it: token ids (L,), pixels (3, s, s) or (V, 3, s, s), picture size."""

    position: int
    question: Question
    ids: Tensor
    pixels: Tensor | None = None
    size: tuple[int, int] | None = None
    fault: str | None = None


@dataclass
class Answerer:
    """A loaded model with the way it is asked.

    Args:
        conversation: name of the template.
        pruner: ``None`` keeps all visual tokens.
    """

    tokenizer: Any
    model: Any
    image_processor: Any
    conversation: str
    pruner: Pruner | None
    max_new_tokens: int

    def prepare(self, position: int, question: Question) -> Prepared:
        """Tokenise a question and preprocess its picture; a broken picture becomes ``fault``."""
        ids = tokenizer_image_token(self.prompt(question), self.tokenizer, return_tensors="pt")
        if not question.has_image:
            return Prepared(position, question, ids)
        try:
            if question.image_data is not None:
                image = load_image_from_base64(question.image_data)
            else:
                image = load_image(question.image)
        except (OSError, ValueError) as error:
            return Prepared(position, question, ids, fault=f"question {question.question_id}: {error}")
        return Prepared(
            position, question, ids, process_images([image], self.image_processor, self.model.config)[0], image.size
        )

    def prompt(self, question: Question) -> str:
        """The whole prompt, the image placeholder first."""
        conversation = conv_templates[self.conversation].copy()
        text = f"{DEFAULT_IMAGE_TOKEN}\n{question.text}" if question.has_image else question.text
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    @torch.inference_mode()
    def answer(self, batch: Sequence[Prepared]) -> list[tuple[str, dict[str, float] | None]]:
        """Text of every answer, and what its picture cost where there is one."""
        length = max(len(item.ids) for item in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros(len(batch), length, dtype=torch.long)
        for row, item in enumerate(batch):
            ids[row, : len(item.ids)] = item.ids
            mask[row, : len(item.ids)] = 1
        shown = [item for item in batch if item.pixels is not None]
        pixels = [item.pixels for item in shown]
        device = self.model.device
        images: Tensor | list[Tensor] | None = None
        if pixels:
            same = len({pixel.shape for pixel in pixels}) == 1
            images = torch.stack(pixels).to(device) if same else [pixel.to(device) for pixel in pixels]
        prompts = self.model.embed_prompts(
            ids.to(device),
            mask.to(device),
            images=images,
            image_sizes=[item.size for item in shown] or None,
            pruner=self.pruner,
            query=[clean_question(item.question.text) for item in batch],
            sample_ids=[item.position for item in batch],
            padding_side="left",
        )
        stop = conv_templates[self.conversation].stop_string
        stopping = {} if stop == self.tokenizer.eos_token else {"stop_strings": [stop], "tokenizer": self.tokenizer}
        output = self.model.generate(
            prompts,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            **stopping,
        )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        kept = iter(prompts.kept)
        answers = []
        for item, text in zip(batch, texts, strict=True):
            cost = cost_of(next(kept), self.model.config) if item.pixels is not None else None
            answers.append((text.split(stop)[0].strip(), cost))
        return answers


def cost_of(tokens: KeptTokens, config: Any) -> dict[str, float]:
    """Visual tokens left at the end of the decoder, their mean over layers, newline tokens, and prefill work.

    What a method inside the decoder has made of dropped tokens is among those left. Such methods rank newline
    tokens like any other: their mean and their work count them.

    Args:
        config: the language model's.
    """
    per_layer = tokens.per_layer or [tokens.patches] * config.num_hidden_layers
    return {
        "visual_tokens": tokens.patches + tokens.recycled,
        "average_tokens": fmean(per_layer),
        "newline_tokens": tokens.newlines,
        "prefill_flops": prefill_flops(per_layer, config.hidden_size, config.intermediate_size),
    }


def prepared_batches(
    prepare: Callable[[int, Question], Prepared],
    questions: Sequence[Question],
    batches: Iterable[Sequence[int]],
    workers: int,
) -> Iterator[list[Prepared]]:
    """Batches (positions of questions) in order, prepared ahead by threads (Pillow and torch free the interpreter)."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[list[Future[Prepared]]] = deque()
        coming = iter(batches)

        def submit() -> None:
            members = next(coming, ())
            if members:
                waiting.append([pool.submit(prepare, position, questions[position]) for position in members])

        try:
            for _ in range(AHEAD_BATCHES + 1):
                submit()
            while waiting:
                batch = [future.result() for future in waiting.popleft()]
                submit()
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Stopwatch:
    """Seconds inside the model, and since the start."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.start = self._now()
        self.model = 0.0

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def elapsed(self) -> float:
        return self._now() - self.start

    def time(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        """Result of a call to the model, and its seconds."""
        start = self._now()
        result = function(*arguments)
        seconds = self._now() - start
        self.model += seconds
        return result, seconds
