"""Videos: from a file or a folder of frames to the pictures that a model sees, and when each of them is.

Files are read with PyAV (``pip install "script-llava[video]"``), folders of frames with Pillow alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from llava.mm_utils import preprocess
from llava.pictures import MAX_PIXELS, load_image
from llava.terminal import printable

if TYPE_CHECKING:
    from av.container import InputContainer

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
CONTAINERS = ("mov", "matroska", "avi", "flv", "mpeg", "mpegts", "asf", "ogg", "gif", "ivf", "h264", "hevc", "wav")
MAX_CLIP_PIXELS = 8 * MAX_PIXELS  # of all frames together, which are held at once
UNEVEN = 1.5  # a step in time that is so many times another is one of a variable frame rate


@dataclass(frozen=True)
class Video:
    """Frames of a video, in the order of time.

    Args:
        frames: T RGB pictures, in their own size.
        indices: where they stand among all frames.
        times: seconds of each; ``None`` for a folder, which does not tell.
        duration: of the whole, in seconds; likewise.
    """

    frames: list[Image.Image]
    indices: list[int]
    times: list[float] | None = None
    duration: float | None = None

    @property
    def time_instruction(self) -> str | None:
        """What LLaVA-Video was told of the times, in its own words; ``None`` if they are not known."""
        if self.times is None:
            return None
        return time_instruction(self.duration, self.times)


def time_instruction(duration: float, times: Sequence[float]) -> str:
    """LLaVA-Video's sentence about when its frames are; the missing space is part of what it was trained with."""
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {format_times(times)}.Please answer the following questions related to this "
        "video."
    )


def format_times(times: Sequence[float]) -> str:
    """Seconds as LLaVA-Video writes them: "0.00s,1.00s"."""
    return ",".join(f"{time:.2f}s" for time in times)


def sample_frames(
    total: int, fps: float, most: int, rate: float = 1.0, force: bool = True
) -> tuple[list[int], list[float]]:
    """Which of ``total`` frames LLaVA-Video looks at, and their times in seconds as it is told them.

    Args:
        fps: average frames per second of the video.
        most: how many frames at most; with ``force`` just so many.
        rate: frames wanted per second, as long as they are not more than ``most``.
        force: spread ``most`` frames evenly from the first to the last, whatever the rate; few are repeated.

    Returns:
        Indices, ascending, and times. Without ``force`` these count steps: seconds where ``rate`` is 1 and ``fps``
        whole, as the published code has it.

    Raises:
        ValueError: no frames, or none wanted.
    """
    for name, value in (("total", total), ("most", most), ("fps", fps), ("rate", rate)):
        if not value > 0:
            raise ValueError(f"sampling frames needs a positive {name}, got {value}")
    step = max(round(fps / rate), 1)
    indices = list(range(0, total, step))
    if len(indices) > most or force:
        indices = np.linspace(0, total - 1, most, dtype=int).tolist()
        return indices, [index / fps for index in indices]
    return indices, [index / step for index in indices]


def load_video(path: str | Path, most: int, rate: float = 1.0, force: bool = True) -> Video:
    """Read the frames of a video that a model looks at.

    Args:
        path: a video file, or a folder with one picture per frame, in the order of the numbers in their names.
        most, rate, force: see `sample_frames`; a folder has no rate, its frames are spread evenly.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no frames, no video stream, a damaged file or frame; names the file and the reason.
        ImportError: a file, and PyAV is not installed; says how to install it.
    """
    path = Path(path)
    if most < 1:
        raise ValueError(f"a video needs at least one frame, got {most}")
    if path.is_dir():
        return _load_folder(path, most, force)
    if not path.is_file():
        raise FileNotFoundError(f"no video file or folder of frames at {path}")
    return _load_file(path, most, rate, force)


def process_video(video: Video | Sequence[Image.Image], image_processor: Any) -> Tensor:
    """Frames as the model takes them: (T, 3, s, s) float32."""
    return preprocess(video.frames if isinstance(video, Video) else list(video), image_processor)


def video_inputs(videos: Sequence[Video]) -> dict[str, Any]:
    """Arguments of a call of a Transformers processor for videos whose frames are sampled: it is to take all of them.

    Where the times of all are known they go along: Qwen3-VL and its kind write them into the prompt.
    """
    given: dict[str, Any] = {"videos": [video.frames for video in videos], "do_sample_frames": False}
    if videos and all(video.times for video in videos):
        given["video_metadata"] = [video_metadata(video) for video in videos]
    return given


def video_metadata(video: Video) -> dict[str, Any]:
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


def _load_folder(folder: Path, most: int, force: bool) -> Video:
    def by_number(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    files = [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
    files.sort(key=by_number)
    if not files:
        raise ValueError(f"{folder} holds no frames: expected pictures ({', '.join(PICTURE_SUFFIXES)})")
    if len(files) < most:
        _tell_few(folder, len(files), most, force)
    count = most if force else min(most, len(files))
    indices = np.linspace(0, len(files) - 1, count, dtype=int).tolist()
    pictures: dict[int, Image.Image] = {}
    for index in dict.fromkeys(indices):
        pictures[index] = load_image(files[index])
        if not index:
            _check_clip(folder, pictures[index].size, len(set(indices)))
    return Video([pictures[index] for index in indices], indices)


def _tell_few(path: Path, found: int, most: int, force: bool) -> None:
    what = "frames are repeated" if force else "all of them are taken"
    logger.warning("%s has only %d frames, %d were asked for: %s", printable(path), found, most, what)


def _check_clip(path: Path, size: tuple[int, int], frames: int) -> None:
    """Raise ValueError if frames of ``size`` (width, height) would take more memory than they may."""
    if size[0] * size[1] * frames > MAX_CLIP_PIXELS:
        raise ValueError(
            f"{path}: {frames} frames of {size[0]} x {size[1]} pixels are more than the limit of {MAX_CLIP_PIXELS} "
            "pixels together: take fewer frames, or a smaller video"
        )


def _load_file(path: Path, most: int, rate: float, force: bool) -> Video:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            'reading video files needs PyAV: pip install "script-llava[video]" (a folder of frames needs nothing)'
        ) from error
    # Only containers that hold their video themselves, told by their content: a playlist would read other files.
    place, options = f"file:{path}", {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    try:
        with av.open(place, options=options, metadata_errors="replace") as container:
            total, fps = _measure(container, path)
        for _ in range(2):  # again if there turn out to be fewer frames than packets
            indices, times = sample_frames(total, fps, most, rate, force)
            with av.open(place, options=options, metadata_errors="replace") as container:
                pictures, decoded = _decode(container, set(indices), path)
            if indices[-1] in pictures:
                break
            total = decoded
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path} is not a video that can be read, or a damaged one: {error.strerror} "
            f"(containers: {', '.join(CONTAINERS)})"
        ) from error
    if indices[-1] not in pictures:
        raise ValueError(f"{path} is damaged: frame {indices[-1]} of {total} cannot be decoded")
    if total < most:
        _tell_few(path, total, most, force)
    return Video([pictures[index] for index in indices], indices, times, total / fps)


def _measure(container: InputContainer, path: Path) -> tuple[int, float]:
    """Number of frames and their average rate, from the packets: what a container says of itself may be missing."""
    if not container.streams.video:
        raise ValueError(f"{path} holds no video, only {', '.join(s.type for s in container.streams) or 'nothing'}")
    stream = container.streams.video[0]
    stamps = sorted(packet.pts or 0 for packet in container.demux(stream) if packet.size)
    if not stamps:
        raise ValueError(f"{path} holds no frames: its video stream is empty")
    steps = np.diff(stamps)
    steps = steps[steps > 0]
    if len(steps) and steps.max() > UNEVEN * steps.min():
        logger.warning(
            "%s has a variable frame rate: frames are counted, times are those of the average rate", printable(path)
        )
    rate = stream.average_rate
    if not rate and len(steps):
        rate = Fraction(1) / (Fraction(float(steps.mean())) * stream.time_base)
    return len(stamps), float(rate or 1)


def _decode(container: InputContainer, wanted: set[int], path: Path) -> tuple[dict[int, Image.Image], int]:
    """Decode up to the last wanted frame: the wanted ones by index, and how many frames there were on the way."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    pictures: dict[int, Image.Image] = {}
    count, last = 0, max(wanted)
    frames: Iterator[Any] = container.decode(stream)
    for count, frame in enumerate(frames, start=1):
        if count - 1 in wanted:
            _check_clip(path, (frame.width, frame.height), len(wanted))
            pictures[count - 1] = frame.to_image()
        if count - 1 == last:
            break
    return pictures, count
