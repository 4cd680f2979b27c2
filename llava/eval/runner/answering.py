"""Prompts in, answers out: pictures prepared ahead by workers, prompts batched and decoded.

Our own runner and the model for lmms-eval both answer here, so that an answer does not depend on who asked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import clean_question, conv_templates
from llava.eval.benchmarks.question import Question
from llava.eval.measure.cost import prefill_flops
from llava.eval.runner import pictures
from llava.layout.visuals import Reading
from llava.mm_utils import load_image, load_image_from_base64, process_images, tokenizer_image_token
from llava.model.kept_tokens import KeptTokens
from llava.pruning import Pruner

AHEAD_BATCHES = 3  # prepared beyond the one that the model is at


class BrokenQuestion(ValueError):
    """A question cannot be asked: its picture is missing or damaged; the message names the question."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it.

    Args:
        ids: (L,) token ids, with IMAGE_TOKEN_INDEX where a picture or video is shown.
        query: the question that the pruner reads.
        number: seeds random methods, so that an answer does not depend on its batch.
        pixels: of each picture (3, s, s) or (V, 3, s, s), of each video (frames, 3, s, s).
        sizes: (width, height) of each picture.
        kinds: "image" or "video" of each.
    """

    ids: Tensor
    query: str
    number: int
    pixels: Sequence[Tensor] = ()
    sizes: Sequence[tuple[int, int]] = ()
    kinds: Sequence[str] = ()


@dataclass(frozen=True)
class Reply:
    """An answer, what its visuals cost (`cost_of`, summed), and the tokens of its prompt and of itself."""

    text: str
    cost: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Prepared:
    """A question, its prompt, the stamp of its picture's file; or why it cannot be asked."""

    position: int
    question: Question
    prompt: Prompt | None = None
    picture: dict[str, Any] | None = None
    fault: str | None = None

    @property
    def ids(self) -> Tensor:
        """(L,) token ids of its prompt."""
        return self.prompt.ids


@dataclass
class Answerer:
    """A loaded model with the way it is asked.

    Args:
        conversation: name of the template.
        pruner: ``None`` keeps all visual tokens.
        max_new_tokens: of the answers to questions.
        reading: how pictures and videos are read; ``None`` is the checkpoint's way.
    """

    tokenizer: Any
    model: Any
    image_processor: Any
    conversation: str
    pruner: Pruner | None
    max_new_tokens: int = 128
    reading: Reading | None = None

    def prepare(self, position: int, question: Question) -> Prepared:
        """Tokenise a question and preprocess its picture; a broken picture becomes ``fault``."""
        if question.fault is not None:
            return Prepared(position, question, fault=f"question {question.question_id}: {question.fault}")
        ids = tokenizer_image_token(self.prompt(question), self.tokenizer, return_tensors="pt")
        query = clean_question(question.text)
        if not question.has_image:
            return Prepared(position, question, Prompt(ids, query, position))
        seen = None
        try:
            if question.image_data is not None:
                image = load_image_from_base64(question.image_data)
            else:
                image, seen = load_image(question.image), pictures.stamp(question.image)
            pixels = process_images([image], self.image_processor, self.reading or self.model.config)[0]
        except (OSError, ValueError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            return Prepared(position, question, fault=f"question {question.question_id}: {reason}")
        return Prepared(position, question, Prompt(ids, query, position, [pixels], [image.size], ["image"]), seen)

    def prompt(self, question: Question) -> str:
        """The whole prompt, the image placeholder first."""
        conversation = conv_templates[self.conversation].copy()
        text = f"{DEFAULT_IMAGE_TOKEN}\n{question.text}" if question.has_image else question.text
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    def answer(self, batch: Sequence[Prepared]) -> list[tuple[str, dict[str, float] | None]]:
        """Text of every answer, decoded greedily, and what its picture cost where there is one."""
        greedy = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        replies = self.reply([item.prompt for item in batch], greedy, truncate=True)
        return [(reply.text.strip(), reply.cost or None) for reply in replies]

    @torch.inference_mode()
    def reply(
        self, prompts: Sequence[Prompt], decoding: Mapping[str, Any], until: Sequence[str] = (), truncate: bool = False
    ) -> list[Reply]:
        """Answer a batch of prompts.

        Args:
            decoding: keyword arguments of `generate`.
            until: strings that end an answer beside the template's own; the text may have a little more after them.
            truncate: see `embed_prompts`.
        """
        ids, mask = padded([prompt.ids for prompt in prompts])
        device = self.model.device
        pixels = [one for prompt in prompts for one in prompt.pixels]
        images: Any = None
        if pixels:
            kinds = {kind for prompt in prompts for kind in prompt.kinds}
            same = len({one.shape for one in pixels}) == 1 and kinds == {"image"}
            images = torch.stack(pixels).to(device) if same else [one.to(device) for one in pixels]
            sizes = [size for prompt in prompts for size in prompt.sizes] or None
            images = self.model.visuals(images, sizes, [kind for p in prompts for kind in p.kinds], self.reading)
        embedded = self.model.embed_prompts(
            ids.to(device),
            mask.to(device),
            images=images,
            pruner=self.pruner,
            query=[prompt.query for prompt in prompts],
            sample_ids=[prompt.number for prompt in prompts],
            padding_side="left",
            truncate=truncate,
        )
        lengths = embedded.attention_mask.sum(-1).tolist()
        stop = conv_templates[self.conversation].stop_string
        ends = [end for end in (stop, *until) if end != self.tokenizer.eos_token]
        output = self.model.generate(
            embedded,
            **decoding,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            **({"stop_strings": ends, "tokenizer": self.tokenizer} if ends else {}),
        )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        kept = iter(embedded.kept)
        replies = []
        for prompt, text, new_ids, length in zip(prompts, texts, output, lengths, strict=True):
            costs = [cost_of(next(kept), self.model.config) for _ in prompt.pixels]
            total = {name: sum(cost[name] for cost in costs) for name in (costs[0] if costs else {})}
            replies.append(Reply(text.split(stop)[0], total, length, self._count_new(new_ids)))
        return replies

    def _count_new(self, ids: Tensor) -> int:
        """Tokens of an answer (t,) up to its end, without the padding of its batch."""
        ends = (ids == self.tokenizer.eos_token_id).nonzero()
        return int(ends[0]) + 1 if len(ends) else len(ids)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of token ids (L_i,) as ids and mask (B, L), padded on the right."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


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
