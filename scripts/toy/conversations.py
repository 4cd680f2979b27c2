"""Training examples of the language model: questions about one picture, and the visual tokens it gets to see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from formats import MAKERS, SHORT, as_asked, caption, checklist
from questions import NO, YES, Question, draw
from scenes import Layout
from torch import Tensor
from views import PADDING, UNSURE

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token


@dataclass
class Talk:
    """A conversation about one picture: prompt ids with labels on the answers, and what its questions ask about."""

    ids: list[int]
    labels: list[int]
    questions: list[Question]


def draw_questions(layout: Layout, rng: np.random.Generator, turns: int, makers=MAKERS) -> list[Question]:
    """``turns`` different questions, fewer where the scene has no more."""
    found: dict[str, Question] = {}
    for _ in range(50 * turns):
        question = draw(layout, rng, makers)
        found.setdefault(question.text, question)
        if len(found) == turns:
            break
    return list(found.values())


def make_talk(layout: Layout, questions: list[Question], rng: np.random.Generator, tokenizer) -> Talk:
    """The questions in the ``vicuna_v1`` template, the picture in the first turn; the request for a short answer is
    made every other time, as people who chat do not make it.
    """
    conversation = conv_templates["vicuna_v1"].copy()
    for number, question in enumerate(questions):
        text, suffix = as_asked(question, layout, rng)
        if suffix != SHORT or rng.random() < 0.5:
            text += suffix
        picture = f"{DEFAULT_IMAGE_TOKEN}\n" if number == 0 else ""
        conversation.append_message(conversation.roles[0], picture + text)
        conversation.append_message(conversation.roles[1], question.answer)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer)
    return Talk(ids, answer_labels(ids, tokenizer), questions)


def make_caption(layout: Layout, seen: set[int], rng: np.random.Generator, tokenizer) -> Talk:
    """A picture and what can be told of it: objects ``seen``."""
    things = [layout.objects[number] for number in rng.permutation(sorted(seen))]
    return _plain_talk(caption(things, rng), tokenizer)


def make_checklist(layout: Layout, seen: set[int], rng: np.random.Generator, tokenizer) -> Talk:
    """A picture and twelve things to be found or not; what is learned is whether they are there."""
    talk = _plain_talk(checklist(layout, seen, 12, rng), tokenizer)
    answers = {tokenizer(word, add_special_tokens=False).input_ids[-1] for word in (YES, NO)}
    return replace(talk, labels=[label if label in answers else IGNORE_INDEX for label in talk.labels])


def _plain_talk(text: str, tokenizer) -> Talk:
    """A picture and a text about it in LLaVA's template for pretraining, ``plain``; the text is learned."""
    conversation = conv_templates["plain"].copy()
    conversation.append_message(conversation.roles[0], DEFAULT_IMAGE_TOKEN)
    shown = len(tokenizer_image_token(conversation.get_prompt(), tokenizer))
    conversation.append_message(conversation.roles[1], text)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer)
    return Talk(ids, [IGNORE_INDEX] * shown + ids[shown:], [])


def answer_labels(ids: list[int], tokenizer) -> list[int]:
    """``ids`` where the assistant speaks, end of turn included; IGNORE_INDEX elsewhere."""
    assistant = tokenizer(" ASSISTANT:", add_special_tokens=False).input_ids[-2:]
    labels, speaking = [IGNORE_INDEX] * len(ids), False
    for position, token in enumerate(ids):
        if speaking:
            labels[position] = token
        if token == tokenizer.eos_token_id:
            speaking = False
        elif ids[position - 1 : position + 1] == assistant:
            speaking = True
    return labels


def pad_batch(talks: list[Talk], pad: int) -> dict[str, Tensor]:
    """input_ids, labels, attention_mask (B, L), padded on the right."""
    longest = max(len(talk.ids) for talk in talks)
    ids = torch.full((len(talks), longest), pad)
    labels = torch.full((len(talks), longest), IGNORE_INDEX)
    mask = torch.zeros(len(talks), longest, dtype=torch.bool)
    for row, talk in enumerate(talks):
        length = len(talk.ids)
        ids[row, :length], labels[row, :length] = torch.tensor(talk.ids), torch.tensor(talk.labels)
        mask[row, :length] = True
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@dataclass(frozen=True)
class ViewMap:
    """What the patches of one view show: ``owner`` (576,) the object or a negative class, ``written`` (576,) bool
    where a character stands.
    """

    owner: np.ndarray
    written: np.ndarray

    def characters(self, number: int) -> np.ndarray:
        """Patches of object ``number`` on which characters stand, all of which it takes to read it."""
        return np.flatnonzero((self.owner == number) & self.written)

    def legible(self, patches: np.ndarray) -> set[int]:
        """Objects about which ``patches`` tell all: one patch of a shape, every character of a sign."""
        shown = {int(number) for number in self.owner[patches] if number >= 0}
        return {number for number in shown if np.isin(self.characters(number), patches).all()}

    def subset(self, patches: np.ndarray) -> ViewMap:
        return ViewMap(self.owner[patches], self.written[patches])

    def needed(self, targets: list[int]) -> int:
        """How many patches it takes to tell what ``targets`` are."""
        return sum(max(1, len(self.characters(target))) for target in targets if target in self.owner)


def most_forced(budget: int) -> int:
    """How many of ``budget`` patches may be forced in for what is asked about: three quarters."""
    return 3 * budget // 4


def choose_patches(view: ViewMap, targets: list[int], budget: int, rng: np.random.Generator) -> np.ndarray:
    """A random subset that favours objects: ``budget`` ascending patch numbers.

    One or two patches of every object asked about, of signs all characters, are always among them (while there is room
    in three quarters of the budget), so that the answer can be known; the others are drawn without replacement,
    objects three times as likely as the rest.
    """
    owner = view.owner
    weight = np.ones(owner.size)
    weight[owner >= 0] = 3.0
    weight[owner == UNSURE] = 1.5
    weight[owner == PADDING] = 0.2
    weight[np.isin(owner, targets)] = 6.0
    order = np.argsort(-(np.log(weight) + rng.gumbel(size=owner.size)))
    first, second = [], []
    for target in rng.permutation(targets):
        characters, patches = view.characters(target), order[owner[order] == target]
        first += characters.tolist() or patches[:1].tolist()
        second += [] if len(characters) else patches[1:2].tolist()
    forced = (first + second)[: most_forced(budget)]
    rest = order[~np.isin(order, forced)]
    return np.sort(np.concatenate((np.array(forced, dtype=np.int64), rest[: budget - len(forced)])))
