"""Mixed in before a family's model: from pictures and plans to the rows that vLLM puts on the placeholders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group, tensor_model_parallel_all_reduce
from vllm.logger import init_logger

from llava.integrations.vllm.features import FeatureCache, PictureFeatures
from llava.integrations.vllm.metrics import WorkerMetrics
from llava.integrations.vllm.plan import PicturePlan
from llava.integrations.vllm.processing import PrunedProcessingInfo, model_name, server_options, server_reading
from llava.integrations.vllm.relevance import relevance_sign
from llava.integrations.vllm.resets import hook_resets
from llava.integrations.vllm.selection import TokenSelector
from llava.integrations.vllm.startup import start_line
from llava.relevance.asked import LanguageSpace
from llava.relevance.clip import ClipJointSpace
from llava.relevance.first_attention import FirstAttention
from llava.relevance.heads import HeadWeights

logger = init_logger("vllm.script")

LARGE_BLOCK = 32  # tokens; vLLM takes blocks of 128 on a CPU


class PrunedModel:
    """What a pruned model has beside its family's own code."""

    script_info: type[PrunedProcessingInfo]
    supports_tower_connector_lora = False  # vLLM counts the tower's tokens by the placeholders, which are fewer here

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config = vllm_config.model_config
        self.script_server, _ = server_options(model_config)
        self.script_reading = server_reading(model_config, self.script_info.script_has_clip)
        self.script_text_config = model_config.hf_config.get_text_config()
        self.script_cache = FeatureCache(self.script_server.feature_cache_mib * 2**20)
        self.script_selector: TokenSelector | None = None
        hook_resets()
        is_first = get_tp_group().rank_in_group == 0 and get_pp_group().is_first_rank
        self.script_metrics = WorkerMetrics(model_name(model_config), is_first)
        if is_first:
            pixels_gib = model_config.multimodal_config.mm_processor_cache_gb
            logger.info("%s", start_line(self.script_reading, self.script_server, pixels_gib))
            block = vllm_config.cache_config.block_size
            if self.script_reading.options.reuse != "none" and block > LARGE_BLOCK:
                logger.warning(
                    "prefixes are cached in blocks of %d tokens, more than a pruned picture may have: start with "
                    "--block-size 32, or questions about one picture will not find it there",
                    block,
                )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The family's own; features of pictures that older weights made are forgotten.

        What a question is read with is loaded too, so that a server that lacks it does not start.
        """
        try:
            loaded = super().load_weights(weights)
        finally:
            self.script_cache.clear()
        if get_pp_group().is_first_rank and self.script_selector is None:  # later stages see no picture
            self.script_selector = self.make_selector()
        return loaded

    def script_choose(self, pictures: Sequence[PictureFeatures], plans: Sequence[PicturePlan]) -> list[Tensor | None]:
        """Numbers of the kept tokens of every picture: see `TokenSelector.select`."""
        if self.script_selector is None:  # weights came without `load_weights`, for example random ones
            self.script_selector = self.make_selector()
        with self.script_metrics.selecting([plan.method for plan in plans]):
            return self.script_selector.select(pictures, plans)

    def make_selector(self) -> TokenSelector:
        """The selector, with all that requests may have their questions read by.

        Raises:
            UnreadableAttentionError: the decoder is not as vLLM's version that this plugin knows has it.
        """
        parameter = next(self.parameters())
        decoder = self.language_model.model
        attention, own_heads = None, slice(None)
        if self.script_reading.offer.no_attention is None:
            attention = FirstAttention.find(decoder, self.script_text_config)
            heads = attention.attention.q_size // attention.head_dim  # of this rank
            file = getattr(self.script_reading.method, "heads", None)  # told at the start if it is another model's
            if file is not None:
                HeadWeights.read(file).for_attention(attention, file)
            own_heads = slice(get_tp_group().rank_in_group * heads, (get_tp_group().rank_in_group + 1) * heads)
        folder = self.script_reading.joint_space  # no module: the checkpoint's loader would look for its weights
        space = None if folder is None else ClipJointSpace.load(folder, parameter.dtype, parameter.device)
        language = LanguageSpace(
            tokenize=lambda ids: ids,  # the front end has a tokenizer, the worker none
            lookup=lambda ids: decoder.embed_input_ids(ids.to(parameter.device)),
            attention=attention,
            sum_over_ranks=tensor_model_parallel_all_reduce,
            own_heads=own_heads,
        )
        return TokenSelector(language, space, relevance_sign(self.script_server, self.config), same_on_all_ranks)

    def script_features(
        self,
        plans: Sequence[PicturePlan],
        shapes: Sequence[tuple[int, int]],
        encode: Callable[[list[int]], list[PictureFeatures]],
        device: torch.device,
    ) -> list[PictureFeatures]:
        """Unpruned features of every picture.

        Args:
            shapes: (V, n) of each, which features that were kept must have.
            encode: makes those of the numbered pictures that are not at hand.
        """
        keys = [(plan.picture, *shape) for plan, shape in zip(plans, shapes, strict=True)]
        found = {key: self.script_cache.get(key[0], device, *key[1:]) for key in dict.fromkeys(keys)}
        missing = [keys.index(key) for key, features in found.items() if features is None]
        for number, features in zip(missing, encode(missing) if missing else [], strict=True):
            found[keys[number]] = features
            self.script_cache.put(plans[number].picture, features)
        self.script_metrics.looked_up(len(found) - len(missing), len(missing), self.script_cache.size)
        return [found[key] for key in keys]


def same_on_all_ranks(indices: Tensor) -> Tensor:
    """The indices of the first tensor-parallel rank: another choice elsewhere would spoil rows silently."""
    group = get_tp_group()
    return group.broadcast(indices.contiguous(), src=0) if group.world_size > 1 else indices
