"""The question side of a LLaVA: what is asked, where it can be read, and its embedding for a method that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import encode_text
from llava.model.token_selection import CallPlan
from llava.model.vision_side import VisionSide
from llava.relevance.asked import Asked, LanguageSpace
from llava.relevance.first_attention import FirstAttention, UnreadableAttentionError
from llava.relevance.policy import Announcer, Offer, settle
from llava.relevance.question import check_asked, given_questions, last_question


class QuestionSide:
    """Tokenizer, input embeddings, first attention and text tower of a model, put to work; the model owns them.

    Args:
        vision: has the tower that may bring a joint space.
        embeddings: the language model's input embeddings.
        tokenizer: reads questions out of prompts and their words; ``None`` if the model has none.
        announcer: tells once where the question is read.
    """

    def __init__(self, vision: VisionSide, embeddings: nn.Module, tokenizer: Any, announcer: Announcer) -> None:
        self.vision = vision
        self.embeddings = embeddings
        self.tokenizer = tokenizer
        self.announcer = announcer

    def read(self, rows: Sequence[Tensor], query: str | Sequence[str] | None) -> list[str | None]:
        """The question of every row (L,) of token ids, as given or as read from it; ``None`` without a tokenizer."""
        given = given_questions(query, len(rows))
        if given is not None:
            return given
        if self.tokenizer is None:
            return [None] * len(rows)
        return [last_question(self.tokenizer.decode(row[row != IMAGE_TOKEN_INDEX])) for row in rows]

    def offer(self) -> Offer:
        """Which sources of relevance can be had here, and why the others cannot."""
        tower = self.vision.tower
        no_words = None
        if self.tokenizer is None:
            no_words = "the model has no tokenizer: load it with load_pretrained_model, or attach the method with one"
        _, no_attention = self.first_attention()
        return Offer(tower.why_no_joint_space(), no_words, no_attention, f"the vision tower's {tower.kind}")

    def ask(
        self,
        plan: CallPlan,
        questions: Sequence[str | None],
        of_row: Sequence[int] | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> CallPlan:
        """The plan with the questions, embedded for its method: see `LlavaMetaForCausalLM.asked`."""
        plan = replace(plan, sample_ids=None if sample_ids is None else tuple(sample_ids))
        if not plan.selects:
            return plan
        of_row = range(len(questions)) if of_row is None else of_row
        method, choice = plan.method, None
        if method.reads_question:
            method, choice = settle(method, self.offer())
            check_asked({row: questions[row] for row in of_row}, method.name)
            self.announcer.tell(method, choice)
        tower, sign = self.vision.tower, self.vision.relevance_sign
        of_picture = [questions[row] for row in of_row]
        asked = Asked(method, of_picture, tower, self.language_space(), sign, tower.device)
        return replace(plan, method=method, choice=choice, asked=asked)

    def language_space(self) -> LanguageSpace | None:
        """The decoder's own reading of a question; ``None`` without a tokenizer."""
        tokenizer, embed = self.tokenizer, self.embeddings
        if tokenizer is None:
            return None
        return LanguageSpace(
            lambda question: encode_text(question, tokenizer),
            lambda ids: embed(ids.to(embed.weight.device, non_blocking=True)),
            self.first_attention()[0],
        )

    def first_attention(self) -> tuple[FirstAttention | None, str | None]:
        """The decoder's first attention, or why it cannot be read."""
        try:
            return FirstAttention.find(self.vision.body), None
        except UnreadableAttentionError as error:
            return None, str(error)
