"""Videos as the library's processors take them: frames that are chosen already, and when they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.video import Video


def video_inputs(videos: Sequence[Video]) -> dict[str, Any]:
    """Arguments of a processor's call for videos whose frames are sampled: it is to take all of them.

    Where the times of all are known they go along: Qwen3-VL and its kind write them into the prompt.
    """
    given: dict[str, Any] = {"videos": [video.frames for video in videos], "do_sample_frames": False}
    if videos and all(video.times for video in videos):
        given["video_metadata"] = [metadata(video) for video in videos]
    return given


def metadata(video: Video) -> dict[str, Any]:
    """What the library calls a video's metadata; frames a second such that index / fps is a frame's time."""
    first, last = video.times[0], video.times[-1]
    steps = video.indices[-1] - video.indices[0]
    rate = steps / (last - first) if last > first else 1.0
    return {
        "total_num_frames": max(video.indices[-1] + 1, round((video.duration or 0.0) * rate)),
        "fps": rate,
        "duration": video.duration,
        "frames_indices": list(video.indices),
        "width": video.frames[0].width,
        "height": video.frames[0].height,
    }
