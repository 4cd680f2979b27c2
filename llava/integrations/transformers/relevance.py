"""How relevant each visual token is to the question, on a host that is not ours.

Without a joint space the question is the mean of its tokens' embeddings in the language model, and relevance the
cosine with it: the projector was trained to put features into that space, so the sign is +1. Where the vision tower is
a CLIP or SigLIP whose folder is named, relevance is read in that model's joint space, with that space's sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.transformers.capture import Capture
from llava.integrations.transformers.encoder_fields import EncoderFields
from llava.integrations.transformers.host import Host
from llava.integrations.transformers.joint_space import HostJointSpace
from llava.integrations.transformers.pictures import Picture
from llava.integrations.transformers.selection import Candidates
from llava.pruning import Pruner, PruningInputs
from llava.pruning.functional import relevance_scores
from llava.pruning.question_reader import pooled_query
from llava.relevance.question import find_questions

JOINT = frozenset({"image_embeds", "text_embeds"})
GIVEN = JOINT | {"query_embeds"}
IMAGE_MARK = "<image>"  # known to question.py

Describe = Callable[[Sequence[Candidates], Tensor], dict[str, Any]]


class RelevanceSource:
    """Gives a method the fields of `PruningInputs` that speak of the question.

    Args:
        processor: processor or tokenizer of the model; needed by methods that read the question.
        clip, siglip: see `AttachedPruner`.

    Raises:
        ValueError: the method needs what this host cannot give, or the processor is of another model.
    """

    def __init__(self, host: Host, pruner: Pruner, processor: Any, clip: str | None, siglip: str | None) -> None:
        self.host = host
        self.pruner = pruner
        self._check_method()
        self.tokenizer = checked_tokenizer(host, processor)
        if clip is not None and siglip is not None:
            raise ValueError("name one joint space, clip= or siglip=, not both")
        self.space: HostJointSpace | None = None
        if clip is not None or siglip is not None:
            if not pruner.needs & JOINT:
                raise ValueError(
                    f"pruner '{pruner.name}' with these options reads no joint space: leave clip= or siglip= out"
                )
            self.space = HostJointSpace(host, clip or siglip, "siglip" if clip is None else "clip")

    def _check_method(self) -> None:
        pruner = self.pruner
        self.encoder: EncoderFields | None = None
        if pruner.place == "encoder":
            self.encoder = EncoderFields(self.host, pruner)
            return
        if pruner.place == "decoder" or (pruner.place == "projected" and pruner.needs <= GIVEN):
            return
        where = {
            "pixels": "on the pixels",
            "projected": f"on {', '.join(sorted(pruner.needs - GIVEN))}",
        }[pruner.place]
        raise ValueError(
            f"pruner '{pruner.name}' acts {where}, which it can do in LLaVA's own code (llava.model) but not in "
            f"{type(self.host.model).__name__}: take one that reads projected features and relevance alone"
        )

    @property
    def reads_question(self) -> bool:
        return bool(self.pruner.needs & GIVEN)

    @property
    def reads_encoder(self) -> bool:
        return self.space is not None or self.encoder is not None

    @property
    def watched_layer(self) -> nn.Module | None:
        return None if self.encoder is None else self.encoder.layer

    def describer(
        self,
        capture: Capture,
        pictures: Sequence[Picture],
        input_ids: Tensor,
        attention_mask: Tensor,
        query: str | Sequence[str] | None,
    ) -> Describe:
        """What tells `select_tokens` about the tower's views and the question of each row of prompts (B, L).

        Args:
            query: the question of all rows, or one per row; ``None`` reads it out of each prompt.
        """
        ask = self._asking(capture, pictures, input_ids, attention_mask, query)
        if self.encoder is None:
            return ask
        of_images = self.encoder.of(capture)

        def describe(group: Sequence[Candidates], features: Tensor) -> dict[str, Any]:
            images = torch.tensor([one.picture for one in group])
            return ask(group, features) | {
                name: value[images.to(value.device)].to(features.device) for name, value in of_images.items()
            }

        return describe

    def _asking(
        self,
        capture: Capture,
        pictures: Sequence[Picture],
        input_ids: Tensor,
        attention_mask: Tensor,
        query: str | Sequence[str] | None,
    ) -> Describe:
        """The part of `describer` that is about the question."""
        if not self.reads_question:
            return lambda group, features: {}
        questions = self.questions(pictures, input_ids, attention_mask, query)
        distinct = list(dict.fromkeys(questions.values()))
        of_row = {row: distinct.index(question) for row, question in questions.items()}

        def row_of(group: Sequence[Candidates], device: torch.device) -> Tensor:
            return torch.tensor([of_row[pictures[one.picture].row] for one in group], device=device)

        if self.space is not None:
            text, text_mask = self.space.text_embeds(distinct)
            image = self.space.image_embeds(capture, input_ids)

            def in_joint_space(group: Sequence[Candidates], features: Tensor) -> dict[str, Any]:
                rows = torch.tensor([pictures[one.picture].row for one in group], device=image.device)
                columns = torch.stack([one.columns for one in group]).to(image.device)
                asked = row_of(group, text.device)
                return {
                    "image_embeds": image[rows[:, None], columns].to(features.device),
                    "text_embeds": text[asked].to(features.device),
                    "text_mask": text_mask[asked].to(features.device),
                    "relevance_sign": self.space.relevance_sign,
                }

            return in_joint_space

        embeds, mask = self.embed(distinct)

        def in_language_space(group: Sequence[Candidates], features: Tensor) -> dict[str, Any]:
            asked = row_of(group, embeds.device)
            fields = {
                "query_embeds": embeds[asked].to(features.device),
                "query_mask": mask[asked].to(features.device),
            }
            if self.pruner.needs & JOINT:
                query = pooled_query(PruningInputs(features, **fields))
                fields["relevance"] = relevance_scores(features, query, sign=self.language_space_sign)
            return fields

        return in_language_space

    @property
    def language_space_sign(self) -> int:
        """+1, or the sign that was asked for; a method's own default is about joint spaces and does not count."""
        asked = self.pruner.relevance_sign
        return 1 if asked is None or asked == type(self.pruner).relevance_sign else asked

    def questions(
        self,
        pictures: Sequence[Picture],
        input_ids: Tensor,
        attention_mask: Tensor,
        query: str | Sequence[str] | None,
    ) -> dict[int, str]:
        """The question of every row that has a picture.

        Raises:
            ValueError: a list of another length than the batch, or no question to be found.
        """
        last = {picture.row: int(picture.columns[-1]) for picture in pictures}
        if isinstance(query, str):
            return dict.fromkeys(last, query)
        if query is not None:
            if len(query) != len(input_ids):
                raise ValueError(f"query= has {len(query)} questions for a batch of {len(input_ids)} prompts")
            return {row: query[row] for row in last}
        if self.tokenizer is None:
            raise ValueError(
                f"pruner '{self.pruner.name}' selects by the question: attach it with the model's processor, "
                "pruner(model, processor), which reads it from the prompt"
            )
        found = {}
        for row, column in last.items():
            text = self._rendered(input_ids[row], attention_mask[row].bool(), column)
            found[row] = find_questions(text, scope="latest_turn")[0].text
            if not found[row]:
                raise ValueError(f"row {row} has no question that could be read out of its prompt: pass query=")
        return found

    def _rendered(self, ids: Tensor, real: Tensor, last: int) -> str:
        """The text of a prompt (L,) with one mark where its last visual token stands."""
        unspoken = {*self.host.placeholders.values(), self.tokenizer.pad_token_id, self.tokenizer.bos_token_id}
        unspoken -= {None, self.tokenizer.eos_token_id}  # the end token closes turns of some templates
        text = real & ~torch.isin(ids, torch.tensor(sorted(unspoken), device=ids.device))
        columns = torch.arange(len(ids), device=ids.device)
        before, after = (self.tokenizer.decode(ids[text & part]) for part in (columns < last, columns > last))
        return f"{before}{IMAGE_MARK}{after}"

    def embed(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T questions -> input embeddings of the language model (T, l, d), and a mask (T, l)."""
        if self.tokenizer is None:
            raise ValueError(
                f"pruner '{self.pruner.name}' selects by the question: attach it with the model's processor, "
                "pruner(model, processor), whose tokenizer reads it"
            )
        ids = [torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids) for text in questions]
        lengths = torch.tensor([len(row) for row in ids])
        if not bool(lengths.all()):
            raise ValueError("an empty question: there is nothing to select by")
        lookup = self.host.model.get_input_embeddings()
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.host.model.device)
        with torch.no_grad():
            embeds = lookup(padded)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return embeds, mask.to(embeds.device)


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
    token = getattr(processor, "image_token_id", None)
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
