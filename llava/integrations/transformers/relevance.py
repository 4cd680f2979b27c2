"""What a host of the Transformers library offers to methods that read the question.

Which source is taken is decided in llava/relevance/policy.py, how a question is read in question.py, what is computed
of it in asked.py. Here is what this host gives: the rendered prompt, the language model's embeddings and first
attention, and the joint space of its vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.transformers.arguments import embedding_device
from llava.integrations.transformers.capture import Capture
from llava.integrations.transformers.encoder_fields import EncoderFields
from llava.integrations.transformers.host import Host
from llava.integrations.transformers.joint_space import HostJointSpace, find_joint_space
from llava.integrations.transformers.pictures import Picture
from llava.integrations.transformers.selection import Contest, Describe
from llava.pruning import Method
from llava.relevance.asked import Asked, LanguageSpace
from llava.relevance.first_attention import FirstAttention, UnreadableAttentionError
from llava.relevance.policy import Announcer, Offer, settle
from llava.relevance.question import check_asked, given_questions, last_question

GIVEN = frozenset({"image_embeds", "text_embeds", "query_embeds", "relevance"})
IMAGE_MARK = "<image>"  # known to question.py
NO_TOKENIZER = (
    "the words of the question need a tokenizer: attach the model with its processor, pruner(model, processor)"
)

announcer = Announcer()


class HostRelevance:
    """A method with its source of relevance settled, and what the host tells it.

    Args:
        processor: processor or tokenizer of the model; needed by methods that read the question.
        clip, siglip: see `AttachedPruner`.

    Attributes:
        method: as it is used, its source settled.
        choice: the source and why; ``None`` for a method that reads no question.

    Raises:
        ValueError: the method needs what this host cannot give, or the processor is of another model.
    """

    def __init__(self, host: Host, method: Method, processor: Any, clip: str | None, siglip: str | None) -> None:
        self.host = host
        self.tokenizer = checked_tokenizer(host, processor)
        self._check_place(method)
        self.space: HostJointSpace | None
        self.space, no_joint_space = find_joint_space(host, method, clip, siglip)
        self.attention, no_attention = first_attention(host) if method.reads_question else (None, None)
        offer = Offer(
            no_joint_space=no_joint_space,
            no_words=None if self.tokenizer is not None else NO_TOKENIZER,
            no_attention=no_attention,
            joint_space="the vision tower's CLIP" if self.space is None else self.space.name,
        )
        self.method, self.choice = settle(method, offer)
        if self.choice is None or self.choice.source != "clip":
            self.space = None
        announcer.tell(self.method, self.choice)

    def _check_place(self, method: Method) -> None:
        self.encoder: EncoderFields | None = None
        beyond = method.needs - GIVEN
        where = None
        if method.place == "encoder":
            self.encoder = EncoderFields(self.host, method)
        elif method.place == "pixels":
            where = "on the pixels"
        elif beyond:
            where = f"on {', '.join(sorted(beyond))}"
        if where is not None:
            raise ValueError(
                f"pruner '{method.name}' acts {where}, which it can do in LLaVA's own code (llava.model) but not in "
                f"{type(self.host.model).__name__}: take one that reads projected features and relevance alone"
            )

    @property
    def reads_encoder(self) -> bool:
        """Whether what enters the projector is needed."""
        return self.space is not None or self.encoder is not None

    @property
    def watched_layer(self) -> nn.Module | None:
        """The layer of the tower that must be watched."""
        return None if self.encoder is None else self.encoder.layer

    # --- the question ----------------------------------------------------------------------------------------------

    def ask(
        self, input_ids: Tensor, attention_mask: Tensor, query: str | Sequence[str] | None
    ) -> tuple[Asked, dict[int, int]]:
        """The questions about the pictures of prompts (B, L), embedded, and the number of each row's question.

        Args:
            query: the question of all rows, or one per row; ``None`` reads it out of each prompt.

        Raises:
            ValueError: no question to be found, or a list of another length than the batch.
        """
        if self.choice is None:
            return Asked(self.method, ()), {}
        marks = torch.tensor(sorted(self.host.placeholders.values()), device=input_ids.device)
        visual = torch.isin(input_ids, marks)
        rows = visual.any(-1).nonzero().flatten().tolist()
        given = given_questions(query, len(input_ids))
        if given is not None:
            questions = {row: given[row] for row in rows}
        elif self.tokenizer is None:
            questions = dict.fromkeys(rows)
        else:
            last = {row: int(visual[row].nonzero().max()) for row in rows}
            shown = attention_mask.bool()
            questions = {row: last_question(self._rendered(input_ids[row], shown[row], last[row])) for row in rows}
        check_asked(questions, self.method.name)
        asked = Asked(
            self.method,
            list(questions.values()),
            joint_space=self.space,
            language=LanguageSpace(self._token_ids, self._embedded, self.attention),
            sign=-1 if self.space is None else self.space.relevance_sign,
            device=None if self.space is None else self.space.device,
        )
        return asked, {row: number for number, row in enumerate(questions)}

    def _rendered(self, ids: Tensor, shown: Tensor, last: int) -> str:
        """The text of a prompt (L,) with one mark where its last visual token stands."""
        unspoken = {*self.host.placeholders.values(), self.tokenizer.pad_token_id, self.tokenizer.bos_token_id}
        unspoken -= {None, self.tokenizer.eos_token_id}  # the end token closes turns of some templates
        text = shown & ~torch.isin(ids, torch.tensor(sorted(unspoken), device=ids.device))
        columns = torch.arange(len(ids), device=ids.device)
        before, after = (self.tokenizer.decode(ids[text & part]) for part in (columns < last, columns > last))
        return f"{before}{IMAGE_MARK}{after}"

    def _token_ids(self, question: str) -> Sequence[int]:
        return self.tokenizer(question, add_special_tokens=False).input_ids

    def _embedded(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., d) as the language model receives them: by the model's own module."""
        embedding = self.host.model.get_input_embeddings()
        return embedding(ids.to(embedding_device(embedding, self.host.model.device)))

    # --- what a method reads ---------------------------------------------------------------------------------------

    def describer(
        self,
        capture: Capture,
        pictures: Sequence[Picture],
        input_ids: Tensor,
        asked: Asked,
        question_of_row: dict[int, int],
    ) -> Describe:
        """What tells `select_tokens` about the tower's views and the question of each row of prompts (B, L)."""
        of_images = {} if self.encoder is None else self.encoder.of(capture)
        in_space = None if self.space is None else self.space.image_embeds(capture, input_ids)

        def describe(group: Sequence[Contest], features: Tensor, valid: Tensor | None) -> dict[str, Any]:
            rows = [pictures[one.picture].row for one in group]

            def image_embeds() -> Tensor:
                columns = torch.stack([one.columns for one in group]).to(in_space.device)
                return in_space[torch.tensor(rows, device=in_space.device)[:, None], columns]

            images = torch.tensor([one.picture for one in group])
            fields = {name: value[images.to(value.device)].to(features.device) for name, value in of_images.items()}
            if self.choice is not None:
                numbers = torch.tensor([question_of_row[row] for row in rows])
                fields |= asked.fields(numbers, features, valid, image_embeds)
            return fields

        return describe


def first_attention(host: Host) -> tuple[FirstAttention | None, str | None]:
    """The language model's first softmax attention, or why it cannot be read."""
    try:
        return FirstAttention.find(host.language_model), None
    except UnreadableAttentionError as error:
        return None, str(error)


def checked_tokenizer(host: Host, processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself; ``None`` for ``None``.

    Raises:
        ValueError: there is none, or it is that of another model.
    """
    if processor is None:
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ValueError(
            f"processor must be the model's processor or tokenizer, with which the question is read; got "
            f"{type(processor).__name__}, which has no tokenizer"
        )
    begins = getattr(processor, "boi_token", None)  # Gemma 3 calls the mark before a picture its image token
    marks = begins is not None and begins == getattr(processor, "image_token", None)
    token = getattr(tokenizer if marks else processor, "image_token_id", None)
    if isinstance(token, int) and token != host.placeholders["image"]:
        raise ValueError(
            f"this processor is of another model: its image token has the id {token}, in "
            f"{type(host.model).__name__} it is {host.placeholders['image']}"
        )
    rows = host.model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows and max(tokenizer.get_vocab().values()) >= rows + len(host.placeholders):
        raise ValueError(
            f"this tokenizer is of another model: it has {len(tokenizer)} tokens, {type(host.model).__name__} "
            f"embeds {rows}"
        )
    return tokenizer
