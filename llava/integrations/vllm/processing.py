"""The front end's part: options and question become a plan, the plan a part of the picture's hash, and its count the
number of placeholders.

vLLM keys its processor cache, its encoder cache and its KV prefix cache by one hash per picture. Here that hash is the
digest of the plan, which holds vLLM's own hash of the picture: what is not the same selection is never taken for it.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from llava.integrations.vllm.joint_space import joint_space_folder
from llava.integrations.vllm.options import (
    JOINT_FIELDS,
    LANGUAGE_FIELDS,
    OPTION_NAMES,
    PicturePlan,
    PruningOptions,
    ServerOptions,
    host_fields,
    read_request_options,
    read_server_options,
)
from llava.integrations.vllm.prompt import questions_of_pictures
from llava.pruning import Pruner
from llava.relevance.question import question_text

PLANS = "script_plans"  # in the processor's keyword arguments: {modality: [PicturePlan]}


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


class PrunedProcessingInfo(ABC):
    """Mixed in before a family's processing info: its options, and the most tokens that they give."""

    script_modalities = ("image",)
    script_has_clip = False  # whether the tower is one whose joint space can be had
    _joint_space_found = False

    @cached_property
    def script_options(self) -> tuple[ServerOptions, PruningOptions]:
        server, options = server_options(self.ctx.model_config)
        self.script_pruner(options, server)
        return server, options

    def script_pruner(self, options: PruningOptions, server: ServerOptions | None = None) -> Pruner:
        """The method, whose files are there: a missing one is told here, before a worker would need it."""
        pruner = options.pruner(host_fields(self.script_has_clip))
        if self.reads_joint_space(pruner) and not self._joint_space_found:
            joint_space_folder(self.script_options[0] if server is None else server, self.get_hf_config())
            self._joint_space_found = True
        return pruner

    def reads_joint_space(self, pruner: Pruner) -> bool:
        return self.script_has_clip and bool(pruner.needs & JOINT_FIELDS)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The most tokens that a picture or video may give under this server's budget."""
        options = self.script_options[1]
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
    def script_views(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> tuple[int, int, int]:
        """A family's own: views of a picture, tokens of each, and tokens beside them that stay when it is pruned."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        refuse_embeddings(inputs.mm_data_items)
        own = {name: value for name, value in inputs.hf_processor_mm_kwargs.items() if name not in OPTION_NAMES}
        plain = dataclasses.replace(inputs, hf_processor_mm_kwargs=own)
        plans = self.script_plans(
            plain, read_request_options(self.info.script_options[1], inputs.hf_processor_mm_kwargs)
        )
        return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs={**own, PLANS: plans}), timing_ctx)

    def script_plans(self, inputs: Any, options: PruningOptions) -> dict[str, list[PicturePlan]]:
        """A plan for every picture of a request. Raises ValueError for a method that cannot be served."""
        pruner = self.info.script_pruner(options)
        hashes = super()._get_mm_hashes(inputs)
        plans = {}
        for modality in self.info.script_modalities:
            pictures = hashes.get(modality, [])
            queries: list[str | None] = [None] * len(pictures)
            if options.prunes and reads_question(pruner):
                if options.query is None:
                    queries = self.script_questions(inputs.prompt, modality, options, len(pictures))
                else:
                    queries = [question_text(options.query)] * len(pictures)
            plans[modality] = [
                self.script_plan(options, pruner, picture, query)
                for picture, query in zip(pictures, queries, strict=True)
            ]
        return plans

    def script_questions(self, prompt: list[int], modality: str, options: PruningOptions, count: int) -> list[str]:
        """The question of each picture, from the prompt."""
        return questions_of_pictures(
            prompt, self.script_placeholder(modality), self.info.get_tokenizer(), options.query_scope, count
        )

    def script_plan(self, options: PruningOptions, pruner: Pruner, picture: str, query: str | None) -> PicturePlan:
        ids: tuple[int, ...] = ()
        if query is not None and not self.info.reads_joint_space(pruner):
            ids = tuple(self.info.get_tokenizer().encode(query, add_special_tokens=False))
        return PicturePlan(
            picture,
            options.keep_tokens,
            options.image_pruning_rate,
            options.min_visual_tokens,
            options.image_pruning_method,
            json.dumps(dict(options.image_pruning_args), sort_keys=True),
            query,
            ids,
        )

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
        data = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=own)
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
            ValueError: the plan keeps more than the server has reserved.
        """

        def replacement(index: int) -> Any:
            full = stock(index) if callable(stock) else stock
            views, tokens, beside = self.script_views(modality, index, mm_items, out_mm_kwargs)
            plan = plans[index]
            self.info.script_options[1].check_request(plan.budget, tokens)
            count = plan.count(tokens)
            return full if count >= tokens else shortened(full, views * count + beside)

        return replacement


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


def without_plans(kwargs: Mapping[str, Any]) -> tuple[dict[str, list[PicturePlan]], dict[str, Any]]:
    """The plans among the processor's keyword arguments, and the arguments without them."""
    return kwargs.get(PLANS, {}), {name: value for name, value in kwargs.items() if name != PLANS}


def reads_question(pruner: Pruner) -> bool:
    return bool(pruner.needs & (JOINT_FIELDS | LANGUAGE_FIELDS))


def refuse_embeddings(mm_items: Mapping[str, Any]) -> None:
    """Raise ValueError for pictures that come as embeddings."""
    for modality, items in mm_items.items():
        if isinstance(items, (EmbeddingItems, DictEmbeddingItems)):
            raise ValueError(
                f"this model is served pruned and needs pixels, but got {modality} embeddings: send the {modality} "
                "itself, or shorten the embeddings yourself and serve the model under its own architecture"
            )
