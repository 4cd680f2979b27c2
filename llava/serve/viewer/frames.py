"""The frames of a video as a model of the Transformers library saw them, and which token stands where in them.

Known of two kinds of model: one grid for each frame, or for every two (Qwen2-VL and its successors), and square frames
(LLaVA-OneVision, LLaVA-NeXT-Video).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.integrations.transformers import KeptPicture
from llava.integrations.transformers.host import find_host
from llava.serve.transformers_picture import SeenView, colours_of
from llava.video import Video

GRID, PIXELS = "video_grid_thw", "pixel_values_videos"


def seen_frames(
    model: Any, processor: Any, inputs: dict[str, Any], video: Video, kept: Sequence[KeptPicture] | None
) -> list[SeenView]:
    """The frames of a prompt's one video, in the order of time; a model may join neighbours to one.

    Args:
        inputs: what the processor made of prompt and video.
        kept: of the last call; ``None`` if nothing was pruned.

    Raises:
        ValueError: it is not known where the tokens of this model stand in its frames.
    """
    views = _views(model, inputs) if kept is None else [one.picture.views for one in kept]
    if len(views) != 1:
        raise ValueError(f"{type(model).__name__} reads the video as {len(views)} pieces")
    if len(inputs.get(GRID, ())) == 1:
        vision = model.config.vision_config
        frames, height, width = inputs[GRID][0].tolist()
        shape = height // vision.spatial_merge_size, width // vision.spatial_merge_size
        size = width * vision.patch_size, height * vision.patch_size
        shown = [video.frames[number * len(video.frames) // frames] for number in range(frames)]
        colours = [np.asarray(frame.convert("RGB").resize(size)) for frame in shown]
    elif isinstance(inputs.get(PIXELS), Tensor) and inputs[PIXELS].ndim == 5 and len(inputs[PIXELS]) == 1:
        pixels = inputs[PIXELS][0]
        side = math.isqrt(int((views[0] == 0).sum()))
        shape = side, side
        colours = [colours_of(frame, processor.video_processor) for frame in pixels]
    else:
        raise ValueError(f"it is not known what {type(model).__name__} sees of a video")
    places = [(views[0] == number).nonzero().flatten() for number in range(len(colours))]
    if any(len(one) != shape[0] * shape[1] for one in places):
        raise ValueError(f"it is not known where the tokens of {type(model).__name__} stand in its frames")
    return [SeenView(0, seen, one.reshape(shape)) for seen, one in zip(colours, places, strict=True)]


def _views(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """The frame of each token (t,) where no pruner told it: as many tokens for each, and at most one behind them."""
    marks = find_host(model).placeholders
    count = int((inputs["input_ids"] == marks["video"]).sum())
    frames = int(inputs[GRID][0, 0]) if GRID in inputs else inputs[PIXELS].shape[1]
    each = count // frames
    if GRID not in inputs:
        each = math.isqrt(each) ** 2
    if count - each * frames > 1:
        raise ValueError(f"{count} tokens of {type(model).__name__} make no {frames} frames")
    views = torch.arange(frames).repeat_interleave(each)
    return [torch.cat([views, torch.full((count - len(views),), -1)])]
