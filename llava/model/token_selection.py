"""Between the model and a pruner: gather what the method asks for, select, and put the kept tokens in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.layout.views import SlowFast, ViewLayout, kept_places, kept_sequence, with_made_tokens
from llava.model.encoded_images import EncodedImages
from llava.model.questions import Questions
from llava.pruning import DecoderPruner, Pruner, PruningInputs, Selection

if TYPE_CHECKING:
    from llava.model.llava_arch import LlavaMetaForCausalLM

logger = logging.getLogger(__name__)

BESIDE_PATCHES = {"class_attention", "mean_attention", "key_metric", "class_features"}
TOWER_FIELDS = BESIDE_PATCHES | {"encoder_features", "image_embeds", "pixels"}


@dataclass(frozen=True)
class KeptTokens:
    """What one picture gives to the language model.

    Args:
        sequence: (t,) int64 flat patch numbers in reading order, negative at newline tokens; numbers from V * n on
            are tokens that the method made, or the model where nothing was pruned (see layout/views.py).
        layout: the picture's unpruned layout.
        patches: number of visual tokens in ``sequence``, kept and made, newlines not counted.
        selection: the pruner's answer for this picture's views, with what it computed; ``None`` if nothing was pruned
            before the decoder.
        made: (V, k, d) the method's own tokens, projected; ``None`` if it makes none.
        per_layer: visual tokens, newlines among them, that enter each layer of the decoder, where a method inside it
            drops some; ``None`` where all layers see ``sequence``.
        recycled: how many tokens a method inside the decoder has made of dropped ones, which stand beside ``sequence``
            at its end.
    """

    sequence: Tensor
    layout: ViewLayout
    patches: int
    selection: Selection | None = None
    made: Tensor | None = None
    per_layer: tuple[int, ...] | None = None
    recycled: int = 0

    @property
    def is_pruned(self) -> bool:
        return self.selection is not None or self.per_layer is not None

    def surviving(self, places: Tensor) -> KeptTokens:
        """Only the tokens at some places (k,) of ``sequence``: those that a method inside the decoder has left."""
        sequence = self.sequence[places]
        recycled = 0 if self.per_layer is None else self.per_layer[-1] - len(sequence)
        return replace(self, sequence=sequence, patches=int((sequence >= 0).sum()), recycled=recycled)

    @property
    def newlines(self) -> int:
        return len(self.sequence) - self.patches

    def per_view(self) -> list[int]:
        """How many tokens each view gives, kept and made."""
        views, tokens = self.layout.eligible.shape
        numbers = self.sequence.cpu()
        kept = numbers[(numbers >= 0) & (numbers < views * tokens)] // tokens
        if self.made is not None:
            kept = torch.cat([kept, (numbers[numbers >= views * tokens] - views * tokens) // self.made.shape[1]])
        return torch.bincount(kept, minlength=views).tolist()

    def mask(self) -> Tensor:
        """(V, n) bool on the CPU, True at kept patches; made tokens are none."""
        numbers = self.sequence.cpu()
        mask = torch.zeros(self.layout.eligible.numel(), dtype=torch.bool)
        mask[numbers[(numbers >= 0) & (numbers < mask.numel())]] = True
        return mask.reshape(self.layout.eligible.shape)


def keep_everything(encoded: EncodedImages) -> list[KeptTokens]:
    """Every picture with all its tokens, as official LLaVA reads it."""
    return [KeptTokens(layout.sequence, layout, int((layout.sequence >= 0).sum())) for layout in encoded.layouts]


def select_tokens(
    model: LlavaMetaForCausalLM,
    pruner: Pruner | None,
    encoded: EncodedImages,
    questions: Questions,
    sample_ids: Sequence[int] | None = None,
) -> list[KeptTokens]:
    """Run a pruner on the views of all pictures at once.

    Args:
        pruner: ``None``, or a budget of all tokens or more, keeps everything bit for bit.
        questions: what was asked about each picture, made for the same pruner.
        sample_ids: a number per picture that seeds random methods; 0 for each where not given.
    """
    tokens = encoded.features.shape[1]
    if pruner is not None and not keeps_everything(pruner, tokens):
        check_possible(pruner, encoded)
        pruner = questions.pruner
    if isinstance(pruner, DecoderPruner):
        return keep_until_the_decoder(pruner, encoded, model.config.num_hidden_layers)
    if pruner is None or keeps_everything(pruner, tokens):
        return keep_everything(encoded)
    if pruner.scope == "official":
        return [select_from_sequence(model, pruner, encoded.pick([picture])) for picture in range(len(encoded))]
    inputs = gather_inputs(model, pruner, encoded, questions, sample_ids)
    first_view = 0
    if pruner.scope == "view":
        whole = pruner.select(inputs)
        made = whole.made
        if made is not None and pruner.place == "encoder":
            made = model.project(made)
    kept = []
    for picture, layout in enumerate(encoded.layouts):
        views = slice(first_view, first_view + layout.views)
        first_view += layout.views
        if pruner.scope == "view":
            selection = Selection(
                whole.indices[views],
                tokens,
                None if whole.eligible is None else whole.eligible[views],
                {name: value[views] for name, value in whole.details.items()},
                None if whole.made is None else whole.made[views],
                whole.leading,
            )
            own = None if made is None else made[views]
            offsets = torch.arange(layout.views, device=selection.indices.device)[:, None] * tokens
            numbers = selection.indices + offsets
        else:
            joined = join_views(inputs, views)
            selection = pruner.select(joined, keep=min(pruner.count(tokens) * layout.views, joined.tokens))
            own, numbers = None, selection.indices
        layout = layout_to_read(pruner, layout, encoded.layouts_with_padding[picture])
        kept.append(_keep(pruner, layout, numbers, selection, own))
    return kept


def check_possible(pruner: Pruner, encoded: EncodedImages) -> None:
    """Raise ValueError if a method cannot be used on what it is given."""
    for layout in encoded.layouts:
        check_layout(pruner, layout)


def check_layout(pruner: Pruner, layout: ViewLayout) -> None:
    """Raise ValueError if a method cannot be used on a picture or video of this layout."""
    if keeps_everything(pruner, layout.eligible.shape[1]):
        return
    if isinstance(layout.derived, SlowFast):
        raise ValueError(
            "a slow/fast video (add_faster_video) is shortened already: it cannot be pruned as well; keep all tokens, "
            "or set add_faster_video to false"
        )
    if layout.pooled and pruner.place in ("pixels", "encoder"):
        raise ValueError(
            f"pruner '{pruner.name}' acts before the projector, on all patches of a view, but a video is pooled after "
            "it: take a method that acts on projected features or inside the decoder"
        )


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
        patches = (layout.sequence >= 0) & (layout.sequence < layout.eligible.numel())
        may_stay = ~patches
        may_stay[patches] = layout.eligible.flatten()[layout.sequence[patches]]
        eligible = None if bool(may_stay.all()) else may_stay
    return min(count_budget(pruner, layout), len(layout.sequence)), eligible


def _keep(
    pruner: Pruner, layout: ViewLayout, numbers: Tensor, selection: Selection, made: Tensor | None
) -> KeptTokens:
    """Put the chosen patches (flat ``numbers``) and the made tokens (V, k, d) of a picture in reading order."""
    kept_count, made_counts = count_parts(pruner, layout)
    if not pruner.count_is_exact:  # only the data tell
        numbers = numbers[selection.eligible]
        kept_count = len(numbers)
    numbers, keep_newlines = numbers.flatten(), pruner.newlines == "keep"
    if made is None:
        sequence = kept_sequence(layout, numbers, kept_count, keep_newlines)
    else:
        places = kept_places(layout, numbers, kept_count, keep_newlines)
        sequence = with_made_tokens(layout, places, made_counts, made.shape[1], selection.leading)
    return KeptTokens(sequence, layout, kept_count + sum(made_counts), selection, made)


def select_from_sequence(model: LlavaMetaForCausalLM, pruner: Pruner, picture: EncodedImages) -> KeptTokens:
    """Select among all that the language model would read of one picture, newline tokens included."""
    everything = keep_everything(picture)
    layout = picture.layouts[0]
    inputs = PruningInputs(model.gather_tokens(picture, everything)[0][None])
    selection = pruner.select(inputs, keep=count_kept(pruner, layout))
    sequence = layout.sequence.to(selection.indices.device)[selection.indices[0]]
    return KeptTokens(sequence, layout, int((sequence >= 0).sum()), selection)


def keeps_everything(pruner: Pruner, tokens: int) -> bool:
    """Whether the budget reaches all ``tokens`` of a view."""
    return pruner.count(tokens) >= tokens


def layout_to_read(pruner: Pruner | None, layout: ViewLayout, with_padding: ViewLayout) -> ViewLayout:
    """The layout that a pruner leaves tokens of: padding takes part only if it is told so.

    Raises:
        ValueError: the method cannot be used on it; known before the tower runs.
    """
    if pruner is not None:
        check_layout(pruner, layout)
    unpruned = pruner is None or isinstance(pruner, DecoderPruner)  # inside the decoder the prompt is the unpruned one
    if unpruned or pruner.scope == "official" or keeps_everything(pruner, layout.eligible.shape[1]):
        return layout
    if not pruner.exclude_padding:
        return with_padding
    return layout if layout.of_patches is None else layout.of_patches


def count_kept(pruner: Pruner | None, layout: ViewLayout) -> int:
    """Positions that a picture will take in the prompt, known beforehand; newlines kept by option come on top.

    The most that it may take where a method's count is not exact.
    """
    return len(layout.sequence) if isinstance(pruner, DecoderPruner) else count_budget(pruner, layout)


def count_budget(pruner: Pruner | None, layout: ViewLayout) -> int:
    """How many tokens of a picture a pruner's budget stands for; all positions, newlines too, if it is for all."""
    views, tokens = layout.eligible.shape
    if pruner is None or keeps_everything(pruner, tokens):
        return len(layout.sequence)
    if pruner.scope == "official":
        length = len(layout.sequence)
        is_share = isinstance(pruner.keep_tokens, float)
        return pruner.count(length) if is_share else min(pruner.keep_tokens * views, length)
    kept, made = count_parts(pruner, layout)
    return kept + sum(made)


def count_parts(pruner: Pruner, layout: ViewLayout) -> tuple[int, list[int]]:
    """Kept patches of a picture, and made tokens of each of its views."""
    views, tokens = layout.eligible.shape
    count = pruner.count(tokens)
    if pruner.scope != "view":
        return min(count * views, int(layout.eligible.sum())), [0] * views
    kept, made = pruner.kept_and_made(count, layout.eligible)
    return int(kept.sum()), made.tolist()


def gather_inputs(
    model: LlavaMetaForCausalLM,
    pruner: Pruner,
    encoded: EncodedImages,
    questions: Questions,
    sample_ids: Sequence[int] | None = None,
) -> PruningInputs:
    """What the pruner asks for, over the V views of all pictures; expensive fields only if it names them."""
    features = encoded.features
    device = features.device
    counts = torch.tensor([layout.views for layout in encoded.layouts])
    picture_of_view = torch.repeat_interleave(torch.arange(len(counts)), counts)
    view_in_picture = torch.cat([torch.arange(count) for count in counts])
    ids = torch.tensor(sample_ids if sample_ids is not None else [0] * len(counts), dtype=torch.int64)
    fields: dict[str, Any] = {
        "view_ids": (ids[picture_of_view] * 4096 + view_in_picture).to(device, non_blocking=True),
        "relevance_sign": model.relevance_sign,
        "pictures": picture_of_view.to(device, non_blocking=True),
    }
    if pruner.exclude_padding:
        valid = torch.cat([layout.eligible for layout in encoded.layouts])
        if not bool(valid.all()):  # on the CPU: nothing waits for a GPU
            fields["valid"] = valid.to(device, non_blocking=True)
    tower = model.get_vision_tower()
    beside = sorted(pruner.needs & BESIDE_PATCHES)
    if beside and tower.select_feature == "cls_patch":
        raise ValueError(
            f"pruner '{pruner.name}' needs {', '.join(beside)} beside the patches, but this checkpoint's features "
            "count the class token among them (mm_vision_select_feature: cls_patch)"
        )
    for name in sorted(pruner.needs & TOWER_FIELDS):
        fields[name] = encoded.field(name, tower).to(device)
    if "encode" in pruner.needs:
        fields["encode"] = partial(model.encode_images, any_size=True)
    return PruningInputs(features, **fields, **questions.of_views(picture_of_view, device))


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
        pictures=first(inputs.pictures),
        relevance_sign=inputs.relevance_sign,
        view_ids=first(inputs.view_ids),
    )
