"""Work and cache of pruners on the library's classes, of any size on any machine: nothing large is stored or done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llava.eval.measure.cost import count_macs
from llava.eval.measure.decoder_layers import language_figures
from llava.eval.measure.efficiency_subject import QUESTION, TEXT_AFTER, TEXT_BEFORE, Row, cache_bytes
from llava.eval.measure.efficiency_transformers import VisionLanguageModel, tokenizer_of_the_question
from llava.eval.measure.without_storage import WithoutStorage
from llava.pruning import DecoderPruner, Pruner, PruningInputs


class TransformersCounts:
    """A model without storage, whose operations are counted by their shapes, with one picture and one prompt.

    Methods choose among random features of random relevance: what reading the question takes is not counted.
    """

    only_counts = True
    batch = 1

    def __init__(self, subject: VisionLanguageModel) -> None:
        self.model, self.preset = subject.model, subject.preset
        self.tokens_per_view = self.preset.tokens // self.preset.views
        self.own_sizes = sorted(self.preset.resized, reverse=True)
        self.dtype = next(self.model.parameters()).dtype
        self.tokenizer = tokenizer_of_the_question()
        self.vision_macs: dict[int, int] = {}
        self.language: dict[int, tuple[int, int]] = {}

    def suited(self, pruner: Pruner | None) -> Pruner | None:
        """The method itself. Raises ValueError where the model cannot host it, or its work cannot be counted."""
        if pruner is None:
            return None
        pruner.attach(self.model, self.tokenizer, query=QUESTION).remove()
        if isinstance(pruner, DecoderPruner):
            raise ValueError(f"{pruner.name} reads what layers without storage do not have; leave out --counts-only")
        return pruner

    def encode(self, tokens: int) -> int:
        """Multiply-accumulates of pixels -> projected features, of the picture that gives so many tokens."""
        if tokens not in self.vision_macs:
            visual = self.without_storage(self.preset.resized.get(tokens, self.preset.visual))
            with WithoutStorage():
                self.vision_macs[tokens] = count_macs(lambda: self.model.get_image_features(**visual))
        return self.vision_macs[tokens]

    def without_storage(self, visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pixels by their shape alone; grids, which shapes depend on, as they are."""
        return {
            name: value.to("meta", self.dtype) if value.is_floating_point() else value
            for name, value in visual.items()
        }

    def select(self, pruner: Pruner) -> tuple[int, int]:
        """Multiply-accumulates of a selection, and how many tokens it gives."""
        generator = torch.Generator().manual_seed(0)
        width = self.model.config.get_text_config().hidden_size
        shape = (self.preset.views, self.tokens_per_view)
        features = torch.randn(*shape, width, generator=generator, dtype=self.dtype)
        inputs = PruningInputs(features, relevance=torch.rand(shape, generator=generator))
        selection = pruner.select(inputs)
        made = 0 if selection.made is None else selection.made.shape[1]
        tokens = self.preset.views * (selection.indices.shape[1] + made)
        return count_macs(lambda: pruner.select(inputs)), tokens

    def counts(self, row: Row) -> Iterator[dict[str, Any]]:
        """Formulas first, then what the class itself does and remembers, by its shapes."""
        text = self.model.config.get_text_config()
        resized = row.name == "resized"
        macs, tokens = 0, self.preset.tokens if row.keep is None else row.keep * (1 if resized else self.preset.views)
        if row.pruner is not None:
            macs, tokens = self.select(row.pruner)
        yield language_figures(text, [tokens] * text.num_hidden_layers, TEXT_BEFORE, TEXT_AFTER, self.dtype.itemsize)
        language, cache = self.prefill(tokens)
        macs += self.encode(tokens if resized else self.preset.tokens) + language
        yield {"counted_macs": float(macs), "cache_bytes": cache}

    def prefill(self, tokens: int) -> tuple[int, int]:
        """Multiply-accumulates of the language model over text and so many visual tokens, and bytes of its cache."""
        if tokens not in self.language:
            length, width = TEXT_BEFORE + tokens + TEXT_AFTER, self.model.get_input_embeddings().embedding_dim
            prompt = torch.empty(1, length, width, device="meta", dtype=self.dtype)
            caches = []

            def call() -> None:
                output = self.model.model.language_model(inputs_embeds=prompt, use_cache=True)
                self.model.lm_head(output.last_hidden_state[:, -1:])
                caches.append(output.past_key_values)

            macs = count_macs(call)
            self.language[tokens] = macs, cache_bytes(caches[0])
        return self.language[tokens]
