"""What a method will leave of a picture or video, known before the vision tower runs: all of its counts, once.

layout + method -> candidates with a budget each -> how many are kept and made -> positions in the prompt
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.layout.candidates import Candidates, candidates_of, check_together
from llava.layout.views import SlowFast, ViewLayout
from llava.pruning import Method


@dataclass(frozen=True)
class PicturePlan:
    """What a method will leave of one picture or video. Made by `plan_picture`.

    Args:
        layout: the order in which kept tokens are read.
        count: positions that it takes in the prompt; the most it may take where a method's count is not exact.
            Newlines that an option keeps come on top.
        candidates: the selections before the decoder, in the order of views; none where all is kept until then.
        kept: tokens that these selections keep.
        made: tokens that the method makes, of each view.
        target: what a method inside the decoder is to leave of ``count``.
        choosable: (count,) bool, which positions a method inside the decoder may choose; ``None``: all, newlines too.
        per_layer: positions that enter each layer, where a method inside the decoder drops some.
    """

    layout: ViewLayout
    count: int
    candidates: tuple[Candidates, ...] = ()
    kept: int = 0
    made: tuple[int, ...] = ()
    target: int = 0
    choosable: Tensor | None = None
    per_layer: tuple[int, ...] | None = None


def plan_picture(
    method: Method | None, layout: ViewLayout, with_padding: ViewLayout | None = None, layers: int | None = None
) -> PicturePlan:
    """Plan what a method does with a picture or video.

    Args:
        method: ``None`` keeps all.
        layout: where nothing is pruned.
        with_padding: the same if padding counted like anything else; ``None`` where that is ``layout``.
        layers: of the decoder; ``None`` leaves out how many positions enter each.

    Raises:
        ValueError: the method cannot be used on it.
    """
    length = len(layout.sequence)
    unpruned = PicturePlan(layout, length, target=length)
    if method is None:
        return unpruned
    views, tokens = layout.eligible.shape
    pruned = pruned_layout(method, layout, with_padding)
    eligible = pruned.eligible.sum(1).tolist() if method.exclude_padding else None
    candidates = tuple(candidates_of(method, [tokens] * views, length, eligible))
    if all(one.is_whole for one in candidates):
        return unpruned
    check_layout(method, layout)
    if method.place == "decoder":
        target, choosable = min(candidates[0].keep, length), choosable_positions(method, layout)
        per_layer = None
        if layers is not None:
            able = None if choosable is None else int(choosable.sum())
            per_layer = tuple(method.counts(length, target, layers, able))
            per_layer = per_layer if min(per_layer) < length else None
        return PicturePlan(layout, length, target=target, choosable=choosable, per_layer=per_layer)
    if candidates[0].sequence:
        keep = candidates[0].keep
        return PicturePlan(layout, keep, candidates, kept=keep, target=keep)
    check_together(method, candidates)
    parts = [method.kept_and_made(one.keep, pruned.eligible[list(one.views)].reshape(1, -1)) for one in candidates]
    kept, made = (tuple(int(part[i]) for part in parts) for i in (0, 1))
    count = sum(kept) + sum(made)
    return PicturePlan(pruned, count, candidates, sum(kept), made, target=count)


def pruned_layout(method: Method, layout: ViewLayout, with_padding: ViewLayout | None) -> ViewLayout:
    """The layout that a method chooses from: padding takes part only if the method is told so."""
    if method.place == "decoder" or method.scope == "official":  # the prompt as it is where nothing is pruned
        return layout
    if not method.exclude_padding and with_padding is not None:
        return with_padding
    return layout if layout.of_patches is None else layout.of_patches


def check_layout(method: Method, layout: ViewLayout) -> None:
    """Raise ValueError if a method cannot be used on a picture or video of this layout."""
    if isinstance(layout.derived, SlowFast):
        raise ValueError(
            "a slow/fast video (add_faster_video) is shortened already: it cannot be pruned as well; keep all tokens, "
            "or set add_faster_video to false"
        )
    if layout.pooled and method.place in ("pixels", "encoder"):
        raise ValueError(
            f"pruner '{method.name}' acts before the projector, on all patches of a view, but a video is pooled after "
            "it: take a method that acts on projected features or inside the decoder"
        )


def choosable_positions(method: Method, layout: ViewLayout) -> Tensor | None:
    """(t,) bool, which positions of a picture a method inside the decoder may choose; ``None``: all, newlines too."""
    if not method.exclude_padding:
        return None
    patches = (layout.sequence >= 0) & (layout.sequence < layout.eligible.numel())
    choosable = torch.ones_like(patches)
    choosable[patches] = layout.eligible.flatten()[layout.sequence[patches]]
    return None if bool(choosable.all()) else choosable
