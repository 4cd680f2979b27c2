"""Between the model and a pruner: gather what the method asks for, select, and put the kept tokens in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava.mm_utils import encode_text
from llava.model.view_layout import NEWLINE, ViewLayout, kept_sequence
from llava.pruning import DecoderPruner, Pruner, PruningInputs, Selection

if TYPE_CHECKING:
    from llava.model.llava_arch import EncodedImages, LlavaMetaForCausalLM


@dataclass(frozen=True)
class KeptTokens:
    """What one picture gives to the language model.

    Args:
        sequence: (t,) int64 flat patch numbers in reading order, `NEWLINE` at newline tokens.
        layout: the picture's unpruned layout.
        patches: number of visual tokens in ``sequence``, newlines not counted.
        selection: the pruner's answer for this picture's views, with what it computed; ``None`` if nothing was pruned
            before the decoder.
        per_layer: visual tokens, newlines among them, that enter each layer of the decoder, where a method inside it
            drops some; ``None`` where all layers see ``sequence``.
    """

    sequence: Tensor
    layout: ViewLayout
    patches: int
    selection: Selection | None = None
    per_layer: tuple[int, ...] | None = None

    @property
    def is_pruned(self) -> bool:
        return self.selection is not None or self.per_layer is not None

    def surviving(self, places: Tensor) -> KeptTokens:
        """Only the tokens at some places (k,) of ``sequence``: those that a method inside the decoder has left."""
        sequence = self.sequence[places]
        return replace(self, sequence=sequence, patches=int((sequence != NEWLINE).sum()))

    @property
    def newlines(self) -> int:
        return len(self.sequence) - self.patches

    def per_view(self) -> list[int]:
        """How many patches of each view are kept."""
        patches = self.sequence[self.sequence != NEWLINE].cpu()
        tokens = self.layout.eligible.shape[1]
        return torch.bincount(patches // tokens, minlength=self.layout.views).tolist()

    def mask(self) -> Tensor:
        """(V, n) bool on the CPU, True at kept patches."""
        mask = torch.zeros(self.layout.eligible.numel(), dtype=torch.bool)
        mask[self.sequence[self.sequence != NEWLINE].cpu()] = True
        return mask.reshape(self.layout.eligible.shape)


def keep_everything(encoded: EncodedImages) -> list[KeptTokens]:
    """Every picture with all its tokens, as official LLaVA reads it."""
    return [KeptTokens(layout.sequence, layout, int((layout.sequence != NEWLINE).sum())) for layout in encoded.layouts]


def select_tokens(
    model: LlavaMetaForCausalLM,
    pruner: Pruner | None,
    encoded: EncodedImages,
    queries: Sequence[str | None],
    sample_ids: Sequence[int] | None = None,
) -> list[KeptTokens]:
    """Run a pruner on the views of all pictures at once.

    Args:
        pruner: ``None``, or a budget of all tokens or more, keeps everything bit for bit.
        queries: the question that goes with each picture.
        sample_ids: a number per picture that seeds random methods; 0 for each where not given.
    """
    tokens = encoded.features.shape[1]
    if isinstance(pruner, DecoderPruner):
        return keep_until_the_decoder(pruner, encoded, model.config.num_hidden_layers)
    if pruner is None or pruner.count(tokens) >= tokens:
        return keep_everything(encoded)
    inputs = gather_inputs(model, pruner, encoded, queries, sample_ids)
    first_view = 0
    if pruner.scope == "view":
        whole = pruner.select(inputs)
    kept = []
    for picture, layout in enumerate(encoded.layouts):
        views = slice(first_view, first_view + layout.views)
        if pruner.scope == "view":
            selection = Selection(
                whole.indices[views],
                tokens,
                None if whole.eligible is None else whole.eligible[views],
                {name: value[views] for name, value in whole.details.items()},
            )
            offsets = torch.arange(layout.views, device=selection.indices.device)[:, None] * tokens
            numbers = (selection.indices + offsets).flatten()
        else:
            joined = join_views(inputs, views)
            selection = pruner.select(joined, keep=min(pruner.count(tokens) * layout.views, joined.tokens))
            numbers = selection.indices.flatten()
        kept.append(_keep(pruner, encoded, picture, numbers, selection))
        first_view += layout.views
    return kept


def keep_until_the_decoder(pruner: DecoderPruner, encoded: EncodedImages, layers: int) -> list[KeptTokens]:
    """Every picture with all its tokens, and how many of them will enter each layer of the decoder."""
    kept = []
    for tokens in keep_everything(encoded):
        budget, eligible = decoder_budget(pruner, tokens.layout)
        able = None if eligible is None else int(eligible.sum())
        counts = pruner.counts(len(tokens.sequence), budget, layers, able)
        dropped = min(counts) < len(tokens.sequence)
        kept.append(replace(tokens, per_layer=tuple(counts)) if dropped else tokens)
    return kept


def decoder_budget(pruner: DecoderPruner, layout: ViewLayout) -> tuple[int, Tensor | None]:
    """What a method inside the decoder is to leave of a picture, and which of its positions (t,) it may choose.

    The budget is what any other method would keep of the picture. ``None``: all may be chosen, newlines too.
    """
    eligible = None
    if pruner.exclude_padding:
        may_stay = layout.eligible.flatten()[layout.sequence.clamp_min(0)] | (layout.sequence == NEWLINE)
        eligible = None if bool(may_stay.all()) else may_stay
    return count_budget(pruner, layout), eligible


def _keep(pruner: Pruner, encoded: EncodedImages, picture: int, numbers: Tensor, selection: Selection) -> KeptTokens:
    layout = eligible_layout(pruner, encoded.layouts[picture], encoded.layouts_with_padding[picture])
    count = count_kept(pruner, layout)
    sequence = kept_sequence(layout, numbers, count, pruner.newlines == "keep")
    return KeptTokens(sequence, layout, count, selection)


def eligible_layout(pruner: Pruner | None, layout: ViewLayout, with_padding: ViewLayout) -> ViewLayout:
    """The layout that a pruner reads: padding takes part only if it is told so."""
    inside = isinstance(pruner, DecoderPruner)  # such a prompt is the unpruned one
    return with_padding if pruner is not None and not pruner.exclude_padding and not inside else layout


def count_kept(pruner: Pruner | None, layout: ViewLayout) -> int:
    """Positions that a picture will take in the prompt, known beforehand; newlines kept by option come on top."""
    return len(layout.sequence) if isinstance(pruner, DecoderPruner) else count_budget(pruner, layout)


def count_budget(pruner: Pruner | None, layout: ViewLayout) -> int:
    """How many tokens of a picture a pruner's budget stands for; all positions, newlines too, if it is for all."""
    views, tokens = layout.eligible.shape
    if pruner is None or pruner.count(tokens) >= tokens:
        return len(layout.sequence)
    if pruner.scope == "global":
        return min(pruner.count(tokens) * views, int(layout.eligible.sum()))
    return int(layout.eligible.sum(-1).clamp_max(pruner.count(tokens)).sum())


def gather_inputs(
    model: LlavaMetaForCausalLM,
    pruner: Pruner,
    encoded: EncodedImages,
    queries: Sequence[str | None],
    sample_ids: Sequence[int] | None = None,
) -> PruningInputs:
    """What the pruner asks for, over the V views of all pictures; expensive fields only if it names them."""
    features = encoded.features
    device = features.device
    counts = torch.tensor([layout.views for layout in encoded.layouts])
    picture_of_view = torch.repeat_interleave(torch.arange(len(counts)), counts)
    view_in_picture = torch.cat([torch.arange(count) for count in counts])
    ids = torch.tensor(sample_ids if sample_ids is not None else [0] * len(counts), dtype=torch.int64)
    fields: dict[str, Tensor | int | None] = {
        "view_ids": (ids[picture_of_view] * 4096 + view_in_picture).to(device, non_blocking=True),
        "relevance_sign": model.relevance_sign,
    }
    if pruner.exclude_padding:
        valid = torch.cat([layout.eligible for layout in encoded.layouts])
        if not bool(valid.all()):  # on the CPU: nothing waits for a GPU
            fields["valid"] = valid.to(device, non_blocking=True)
    if "encoder_features" in pruner.needs:
        fields["encoder_features"] = encoded.encoder_features
    if "image_embeds" in pruner.needs:
        fields["image_embeds"] = encoded.image_embeds(model.get_vision_tower()).to(device)
    if pruner.needs & {"text_embeds", "query_embeds"}:
        distinct = list(dict.fromkeys(queries))
        if None in distinct:
            raise ValueError(f"pruner '{pruner.name}' selects by the question: pass query=, or load a tokenizer")
        row = torch.tensor([distinct.index(query) for query in queries])[picture_of_view].to(device)
        if "text_embeds" in pruner.needs:
            embeds, mask = model.get_vision_tower().text_embeds(distinct)
            fields["text_embeds"], fields["text_mask"] = embeds.to(device)[row], mask.to(device)[row]
        if "query_embeds" in pruner.needs:
            embeds, mask = embed_queries(model, distinct)
            fields["query_embeds"], fields["query_mask"] = embeds.to(device)[row], mask.to(device)[row]
    return PruningInputs(features, **fields)


def embed_queries(model: LlavaMetaForCausalLM, queries: Sequence[str]) -> tuple[Tensor, Tensor]:
    """T questions -> input embeddings of the language model (T, l, d), and a mask (T, l)."""
    if model.tokenizer is None:
        raise ValueError("relevance=projector needs the model's tokenizer: load it with load_pretrained_model")
    embed = model.get_input_embeddings()
    ids = [torch.tensor(encode_text(query, model.tokenizer), dtype=torch.long) for query in queries]
    lengths = torch.tensor([len(row) for row in ids])
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(embed.weight.device)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return embed(padded), mask.to(padded.device)


def join_views(inputs: PruningInputs, views: slice) -> PruningInputs:
    """The views of one picture as a single view (1, V n, ...)."""

    def join(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[views].flatten(0, 1)[None]

    def first(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[views][:1]

    return PruningInputs(
        features=join(inputs.features),
        encoder_features=join(inputs.encoder_features),
        image_embeds=join(inputs.image_embeds),
        text_embeds=first(inputs.text_embeds),
        text_mask=first(inputs.text_mask),
        query_embeds=first(inputs.query_embeds),
        query_mask=first(inputs.query_mask),
        valid=join(inputs.valid),
        relevance_sign=inputs.relevance_sign,
        view_ids=first(inputs.view_ids),
    )
