"""The front end's part: options and question become a plan, the plan a part of the picture's hash, and its count the
number of placeholders.

vLLM keys its processor cache, its encoder cache and its KV prefix cache by one hash per picture. Here that hash is the
digest of the plan, which holds vLLM's own hash of the picture: what is not the same selection is never taken for it.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from llava.integrations.vllm.bounded import BoundedCache
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
from llava.pruning import Method
from llava.relevance.question import check_asked, question_text

PLANS = "script_plans"  # in the processor's keyword arguments: {modality: [PicturePlan]}
REMEMBERED_UUIDS = 4096


def field_name(modality: str) -> str:
    """Name of the field that carries the plans of a modality to the worker."""
    return f"script_plan_{modality}"


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
        checked = "embeddings"
        try:
            refuse_embeddings(inputs.mm_data_items)
            checked = "options"
            options = read_request_options(self.info.script_options, inputs.hf_processor_mm_kwargs)
            plain = dataclasses.replace(inputs, hf_processor_mm_kwargs={})
            checked = "question"
            plans = self.script_plans(plain, options)
            checked = "prompt"
            laid_out = super().apply(dataclasses.replace(plain, hf_processor_mm_kwargs={PLANS: plans}), timing_ctx)
        except ValueError as error:
            self.script_metrics.refused("budget" if isinstance(error, OverBudgetError) else checked)
            raise ValueError(in_few_words(error)) from error
        for modality, rows in plans.items():
            for plan, place in zip(rows, laid_out["mm_placeholders"].get(modality, ()), strict=False):
                self.script_metrics.laid_out(plan.picture, plan.method, place.get_num_embeds())
        return laid_out

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

    @cached_property
    def script_prepared(self) -> BoundedCache[BatchFeature]:
        """What the picture processor makes of pictures, by their contents: another question finds it here."""
        return BoundedCache(self.info.script_server.pixel_cache_mib * 2**20)

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

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Identity of each picture in every cache: what it is, and which of its tokens go on."""
        plans, own = without_plans(inputs.hf_processor_mm_kwargs)
        others = {name: items for name, items in inputs.mm_data_items.items() if name not in plans}
        hashes = {modality: [plan.digest() for plan in rows] for modality, rows in plans.items() if rows}
        if others:
            plain = dataclasses.replace(inputs, hf_processor_mm_kwargs=own)
            hashes |= {name: rows for name, rows in super()._get_mm_hashes(plain).items() if name in others}
        return hashes

    def _get_cache_missing_processor_kwargs(
        self, inputs: Any, mm_is_cached: Mapping[str, list[bool]]
    ) -> dict[str, Any]:
        plans, own = without_plans(super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached))
        missing = {
            modality: [plan for plan, cached in zip(rows, mm_is_cached[modality], strict=True) if not cached]
            for modality, rows in plans.items()
            if modality in mm_is_cached
        }
        return {**own, PLANS: missing}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        plans, own = without_plans(hf_kwargs)
        key = prepared_key(mm_items, plans, own)
        data = None if key is None else self.script_prepared.get(key)
        if key is not None:
            self.script_metrics.prepared(data is not None, sum(map(len, plans.values())))
        if data is None:
            data = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=own)
            if key is not None:
                self.script_prepared.put(key, data, bytes_of(data))
        data = copy.copy(data)  # what is added belongs to this request
        for modality, rows in plans.items():
            if rows:
                data[field_name(modality)] = [encode_plan(plan) for plan in rows]
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        _, own = without_plans(hf_processor_mm_kwargs)
        fields = {
            field_name(modality): MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in self.info.script_modalities
        }
        return {**super()._get_mm_fields_config(hf_inputs, own), **fields}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[Any]:
        plans, own = without_plans(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(
            mm_items=mm_items, hf_processor_mm_kwargs=own, out_mm_kwargs=out_mm_kwargs
        )
        return [
            dataclasses.replace(
                update,
                replacement=self.script_replacement(
                    update.modality, update.replacement, plans[update.modality], mm_items, out_mm_kwargs
                ),
            )
            if plans.get(update.modality)
            else update
            for update in updates
        ]

    def script_replacement(
        self, modality: str, stock: Any, plans: list[PicturePlan], mm_items: Any, out_mm_kwargs: Any
    ) -> Any:
        """vLLM's own replacement of a placeholder, with as many visual tokens as the plan of the picture says.

        Raises, when it is used:
            ValueError: the plan keeps more than the server has reserved, or its method cannot do with the picture.
        """

        def replacement(index: int) -> Any:
            full = stock(index) if callable(stock) else stock
            shape = self.script_shape(modality, index, mm_items, out_mm_kwargs)
            plan = plans[index]
            self.script_metrics.note_unpruned(plan.picture, visual_tokens(full))
            self.info.script_options.check_request(plan.budget, shape.views, shape.tokens)
            count = plan.count(shape)
            return full if count is None else shortened(full, count + shape.beside)

        return replacement


def model_name(model_config: Any) -> str:
    """The name by which vLLM's own metrics call the model."""
    name = model_config.served_model_name or model_config.model
    return name if isinstance(name, str) else name[0]


def visual_tokens(content: list[int] | PromptUpdateDetails) -> int:
    """How many tokens of a picture's replacement visual embeddings are put on."""
    if not isinstance(content, PromptUpdateDetails):
        return len(content)
    return len(content.full) if content.is_embed is None else int(content.is_embed(content.full).sum())


def shortened(content: list[int] | PromptUpdateDetails, count: int) -> list[int] | PromptUpdateDetails:
    """The same tokens with only the first ``count`` of those that visual embeddings are put on."""
    if not isinstance(content, PromptUpdateDetails):
        return content[:count]
    if content.is_embed is None:
        return dataclasses.replace(content, full=content.full[:count])
    visual = content.is_embed(content.full)
    stays = ~visual | (visual.cumsum(0) <= count)
    return dataclasses.replace(
        content, full=[token for token, stay in zip(content.full, stays.tolist(), strict=True) if stay]
    )


def prepared_key(
    mm_items: Mapping[str, Any], plans: Mapping[str, list[PicturePlan]], own: Mapping[str, object]
) -> str | None:
    """What the picture processor's answer depends on; ``None`` where there is no picture, or something unplanned."""
    if not mm_items or any(len(items) != len(plans.get(name, ())) for name, items in mm_items.items()):
        return None
    return repr(([(name, [plan.picture for plan in plans[name]]) for name in mm_items], sorted(own.items())))


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in nested tables and lists."""
    if isinstance(value, Mapping):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(bytes_of, value))
    return getattr(value, "nbytes", 0)


def without_plans(kwargs: Mapping[str, Any]) -> tuple[dict[str, list[PicturePlan]], dict[str, Any]]:
    """The plans among the processor's keyword arguments, and the arguments without them."""
    return kwargs.get(PLANS, {}), {name: value for name, value in kwargs.items() if name != PLANS}


def refuse_embeddings(mm_items: Mapping[str, Any]) -> None:
    """Raise ValueError for pictures that come as embeddings."""
    for modality, items in mm_items.items():
        if isinstance(items, (EmbeddingItems, DictEmbeddingItems)):
            raise ValueError(
                f"this model is served pruned and needs pixels, but got {modality} embeddings: send the {modality} "
                "itself, or shorten the embeddings yourself and serve the model under its own architecture"
            )
