"""The front end's part: options and question become a plan, the plan a part of the picture's hash, and its count the
number of placeholders.

vLLM keys its encoder cache and its KV prefix cache by one hash per picture. Here that hash is the digest of the plan,
which holds the hash of the picture's content: what is not the same selection is never taken for it. The processor
cache, which knows nothing of plans, is keyed by the content (shipping.py).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.multimodal.processing.processor import ResolvedPromptUpdate

from llava.integrations.vllm.metrics import FrontEndMetrics
from llava.integrations.vllm.options import (
    LONGEST_QUESTION,
    OverBudgetError,
    PruningOptions,
    ServerOptions,
    in_few_words,
    read_request_options,
    read_server_options,
)
from llava.integrations.vllm.plan import PicturePlan, PictureShape
from llava.integrations.vllm.prompt import questions_of_pictures
from llava.integrations.vllm.relevance import Reading, read_by
from llava.integrations.vllm.reuse import HotPictures, without_question
from llava.integrations.vllm.shipping import PLAN_FIELD
from llava.pruning import Method
from llava.relevance.question import check_asked, question_text

PLANS = "script_plans"  # in the processor's keyword arguments: {modality: [PicturePlan]}
REMEMBERED_UUIDS = 4096


def field_name(modality: str) -> str:
    """Name of the field that carries the plans of a modality to the worker."""
    return PLAN_FIELD + modality


def encode_plan(plan: PicturePlan) -> Tensor:
    """A plan as (bytes,) uint8, the form in which vLLM takes per-picture data to its workers."""
    return torch.frombuffer(bytearray(plan.to_bytes()), dtype=torch.uint8)


def decode_plans(field: Tensor | Sequence[Tensor] | None) -> list[PicturePlan]:
    """The plans of a batch of pictures: (pictures, bytes) where all are of one length, else a list."""
    return [] if field is None else [PicturePlan.from_bytes(row.cpu().numpy().tobytes()) for row in field]


def server_options(model_config: Any) -> tuple[ServerOptions, PruningOptions]:
    """Options of the server. Raises ValueError for an unknown name or a value out of range."""
    overrides = getattr(model_config.hf_config, "script_pruning", None)
    return read_server_options(overrides, model_config.multimodal_config.mm_processor_kwargs)


def server_reading(model_config: Any, has_clip: bool) -> Reading:
    """How the server reads questions: the same in every process, since all of them decide by this.

    Raises:
        ValueError: an option out of range, a method that cannot be served, a source that cannot be had.
    """
    server, options = server_options(model_config)
    folder = Path(model_config.model)
    return read_by(server, options, model_config.hf_config, folder if folder.is_dir() else None, has_clip)


class PrunedProcessingInfo(ABC):
    """Mixed in before a family's processing info: its options, and the most tokens that they give."""

    script_modalities = ("image",)
    script_has_clip = False  # whether the tower is one whose joint space can be had

    @cached_property
    def script_reading(self) -> Reading:
        """What cannot be served is told here, before a worker would find out."""
        return server_reading(self.ctx.model_config, self.script_has_clip)

    @cached_property
    def script_server(self) -> ServerOptions:
        return server_options(self.ctx.model_config)[0]

    @property
    def script_options(self) -> PruningOptions:
        """The server's own."""
        return self.script_reading.options

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The most tokens that a picture or video may give under this server's budget."""
        options = self.script_options
        return {
            modality: self.script_most_tokens(modality, options, seq_len, mm_counts)
            for modality in self.supported_mm_limits
        }

    @abstractmethod
    def script_most_tokens(
        self, modality: str, options: PruningOptions, seq_len: int, mm_counts: Mapping[str, int]
    ) -> int:
        """A family's own: the most tokens that one picture or video may give. Arguments as vLLM's hook has them."""


class PrunedProcessor(ABC):
    """Mixed in before a family's multi-modal processor."""

    @abstractmethod
    def script_placeholder(self, modality: str) -> list[int]:
        """A family's own: the token ids that stand for a picture before it is replaced by its visual tokens."""

    @abstractmethod
    def script_shape(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> PictureShape:
        """A family's own: the views of a picture and their tokens."""

    def get_dummy_inputs(self, *arguments: Any, **options: Any) -> Any:
        """vLLM's pictures to measure memory with, and a question about them."""
        inputs = super().get_dummy_inputs(*arguments, **options)
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={"query": "What is shown here?"})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        checked, new = "embeddings", []
        try:
            refuse_embeddings(inputs.mm_data_items)
            checked = "options"
            options = read_request_options(self.info.script_options, inputs.hf_processor_mm_kwargs)
            plain = dataclasses.replace(inputs, hf_processor_mm_kwargs={})
            checked = "question"
            plans = self.script_plans(plain, options)
            checked = "prompt"
            new = self.script_new_pictures(inputs.cache, plans)
            laid_out = super().apply(dataclasses.replace(plain, hf_processor_mm_kwargs={PLANS: plans}), timing_ctx)
        except ValueError as error:
            self.script_metrics.refused("budget" if isinstance(error, OverBudgetError) else checked)
            forget(inputs.cache, new)
            raise ValueError(in_few_words(error)) from error
        except Exception:
            forget(inputs.cache, new)
            raise
        if len(laid_out["prompt_token_ids"]) >= self.info.ctx.model_config.max_model_len:  # vLLM will refuse it
            forget(inputs.cache, new)
        for modality, rows in plans.items():
            for plan, place in zip(rows, laid_out["mm_placeholders"].get(modality, ()), strict=False):
                self.script_metrics.laid_out(plan.picture, plan.method, place.get_num_embeds())
        return laid_out

    def script_new_pictures(self, cache: Any, plans: Mapping[str, list[PicturePlan]]) -> list[str]:
        """Contents of the pictures that vLLM's cache does not hold preprocessed."""
        pictures = [plan.picture for rows in plans.values() for plan in rows]
        new = [picture for picture in pictures if cache is None or not cache.is_cached_item(picture)]
        self.script_metrics.prepared(len(pictures) - len(new), len(new))
        return new

    def script_plans(self, inputs: Any, options: PruningOptions) -> dict[str, list[PicturePlan]]:
        """A plan for every picture of a request.

        Raises:
            ValueError: a method that cannot be served, or one that reads a question where none is asked.
        """
        settle = self.info.script_reading.settle
        asking = settle(options)
        shared = None if options.reuse == "none" else settle(without_question(options, asking[0]))
        contents = self.script_contents(inputs)
        plans = {}
        for modality in self.info.script_modalities:
            pictures = contents.get(modality, [])
            queries: list[str | None] = [None] * len(pictures)
            if pictures and options.prunes and asking[0].reads_question and options.reuse != "picture":
                if options.query is None:
                    queries = self.script_questions(inputs.prompt, modality, options, len(pictures))
                else:
                    queries = [question_text(options.query)] * len(pictures)
                check_asked(queries, asking[0].name)
            plans[modality] = []
            for picture, query in zip(pictures, queries, strict=True):
                settled = asking
                if shared is not None and (query is None or self.script_hot_pictures.ask(picture, query)):
                    settled, query = shared, None
                plans[modality].append(self.script_plan(picture, options, settled, query))
        return plans

    def script_plan(
        self, picture: str, options: PruningOptions, settled: tuple[Method, str], query: str | None
    ) -> PicturePlan:
        """The plan of one picture, by a method and its arguments as `Reading.settle` gives them."""
        method, arguments = settled
        return PicturePlan(
            picture,
            options.keep_tokens,
            options.image_pruning_rate,
            options.min_visual_tokens,
            method.name,
            arguments,
            query,
            self.script_words(method, query),
            options.keep_per,
        )

    @cached_property
    def script_metrics(self) -> FrontEndMetrics:
        return FrontEndMetrics(model_name(self.info.ctx.model_config))

    @cached_property
    def script_hot_pictures(self) -> HotPictures:
        server = self.info.script_server
        return HotPictures(server.reuse_after, server.reuse_seconds)

    def script_contents(self, inputs: Any) -> dict[str, list[str]]:
        """A hash of the content of each picture, whatever uuid a client gave it.

        A picture that comes by its uuid alone is the one that came with it last.
        """
        hashes = super()._get_mm_hashes(dataclasses.replace(inputs, mm_uuid_items=None))
        for modality, uuids in (inputs.mm_uuid_items or {}).items():
            for index, uuid in enumerate(uuids):
                if uuid is None or modality not in hashes:
                    continue
                if inputs.mm_data_items[modality][index] is None:
                    hashes[modality][index] = self._script_uuids.get((modality, uuid), f"unknown uuid {uuid}")
                else:
                    self._script_uuids[modality, uuid] = hashes[modality][index]
                    self._script_uuids.move_to_end((modality, uuid))
                    while len(self._script_uuids) > REMEMBERED_UUIDS:
                        self._script_uuids.popitem(last=False)
        return hashes

    @cached_property
    def _script_uuids(self) -> OrderedDict[tuple[str, str], str]:
        return OrderedDict()

    def script_questions(self, prompt: list[int], modality: str, options: PruningOptions, count: int) -> list[str]:
        """The question of each picture, from the prompt: of a long turn the end."""
        questions = questions_of_pictures(
            prompt, self.script_placeholder(modality), self.info.get_tokenizer(), options.query_scope, count
        )
        return [question[-LONGEST_QUESTION:].strip() for question in questions]

    def script_words(self, pruner: Method, query: str | None) -> tuple[int, ...]:
        """The question's tokens in the language model's vocabulary, for the sources that are read there.

        Raises:
            ValueError: it has none, or some that the language model has no embedding for.
        """
        if query is None or getattr(pruner, "relevance", None) == "clip":
            return ()
        ids = tuple(self.info.get_tokenizer().encode(query, add_special_tokens=False))
        if not ids:
            raise ValueError(f"the question {query!r} has no token in the language model's vocabulary")
        rows = self.info.get_hf_config().get_text_config().vocab_size
        if max(ids) >= rows:
            raise ValueError(f"the question has the token {max(ids)}, but the language model knows {rows}")
        return ids

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        """vLLM's own under the hashes of the contents, so that a picture is preprocessed and sent once for all its
        plans; then each plan beside its picture, as many placeholders as it says, and its digest for what follows."""
        plans = inputs.hf_processor_mm_kwargs[PLANS]
        names = {name: [plan.picture for plan in rows] for name, rows in plans.items() if rows}
        plain = dataclasses.replace(  # a content's hash holds how it was read already
            inputs,
            hf_processor_mm_kwargs={},
            mm_uuid_items={**(inputs.mm_uuid_items or {}), **names},
            media_io_kwargs={name: own for name, own in inputs.media_io_kwargs.items() if name not in names},
        )
        result = super()._cached_apply_hf_processor(plain, timing_ctx)
        updates, kwargs, hashes = dict(result.prompt_updates), dict(result.kwargs), dict(result.hashes)
        for modality in names:
            rows = plans[modality]
            updates[modality] = [
                [self.script_pruned(update, plan) for update in own]
                for own, plan in zip(updates[modality], rows, strict=True)
            ]
            kwargs[modality] = [
                with_plan(item, modality, plan) for item, plan in zip(kwargs[modality], rows, strict=True)
            ]
            hashes[modality] = [plan.digest() for plan in rows]
        return result._replace(prompt_updates=updates, kwargs=MultiModalKwargsItems(kwargs), hashes=hashes)

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> dict[str, list[list[Any]]]:
        """vLLM's own for unpruned pictures, with their shapes: vLLM's cache keeps both for the next question."""
        updates = dict(super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs))
        for modality in set(updates) & set(self.info.script_modalities):
            updates[modality] = [
                [
                    UnprunedPicture(
                        *(getattr(update, field.name) for field in dataclasses.fields(update)),
                        shape=self.script_shape(modality, index, mm_items, out_mm_kwargs),
                    )
                    for update in own
                ]
                for index, own in enumerate(updates[modality])
            ]
        return updates

    def script_pruned(self, update: UnprunedPicture, plan: PicturePlan) -> UnprunedPicture:
        """vLLM's own replacement of a placeholder, with as many visual tokens as the plan of the picture says.

        Raises:
            ValueError: the plan keeps more than the server has reserved, or its method cannot do with the picture.
        """
        self.script_metrics.note_unpruned(plan.picture, visual_tokens(update.content))
        self.info.script_options.check_request(plan.budget, update.shape.views, update.shape.tokens)
        count = plan.count(update.shape)
        if count is None:
            return update
        return dataclasses.replace(update, content=shortened(update.content, count + update.shape.beside))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnprunedPicture(ResolvedPromptUpdate):
    """What vLLM puts on the placeholder of a picture, and the picture's shape."""

    shape: PictureShape


def with_plan(item: MultiModalKwargsItem | None, modality: str, plan: PicturePlan) -> MultiModalKwargsItem:
    """A picture's item, or nothing where the engine has it, and beside it the plan."""
    field = MultiModalFieldElem(data=encode_plan(plan), field=MultiModalBatchedField(keep_on_cpu=True))
    return MultiModalKwargsItem({**(item or {}), field_name(modality): field})


def model_name(model_config: Any) -> str:
    """The name by which vLLM's own metrics call the model."""
    name = model_config.served_model_name or model_config.model
    return name if isinstance(name, str) else name[0]


def visual_tokens(content: PromptUpdateDetails) -> int:
    """How many tokens of a picture's replacement visual embeddings are put on."""
    return len(content.full) if content.is_embed is None else int(content.is_embed(content.full).sum())


def shortened(content: PromptUpdateDetails, count: int) -> PromptUpdateDetails:
    """The same tokens with only the first ``count`` of those that visual embeddings are put on."""
    if content.is_embed is None:
        return dataclasses.replace(content, full=content.full[:count])
    visual = content.is_embed(content.full)
    stays = ~visual | (visual.cumsum(0) <= count)
    return dataclasses.replace(
        content, full=[token for token, stay in zip(content.full, stays.tolist(), strict=True) if stay]
    )


def forget(cache: Any, pictures: Sequence[str]) -> None:
    """Drop pictures of a refused request from the front end's cache: the engine has not seen them."""
    for picture in pictures if cache is not None else ():
        cache.invalidate(picture)


def refuse_embeddings(mm_items: Mapping[str, Any]) -> None:
    """Raise ValueError for pictures that come as embeddings."""
    for modality, items in mm_items.items():
        if isinstance(items, (EmbeddingItems, DictEmbeddingItems)):
            raise ValueError(
                f"this model is served pruned and needs pixels, but got {modality} embeddings: send the {modality} "
                "itself, or shorten the embeddings yourself and serve the model under its own architecture"
            )
