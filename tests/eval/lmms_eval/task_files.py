"""Official tasks of lmms-eval on invented data: files that include the official ones and name other data."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import yaml

OFFICIAL = Path(importlib.util.find_spec("lmms_eval").origin).parent / "tasks"


def write_task(folder, official, split, dataset, name=None, more=""):
    """A task file ``<official name>_local``: prompts, extraction and aggregation stay the official ones.

    Args:
        official: path below the harness's tasks.
        dataset: keyword arguments of `load_dataset`; "path" is the format.
        more: further lines of the file.
    """
    path = OFFICIAL / official
    task = name or f"{path.stem}_local"
    kwargs = {key: value for key, value in dataset.items() if key != "path"}
    config = {"include": str(path), "task": task, "test_split": split, "dataset_path": dataset["path"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(config | {"dataset_kwargs": kwargs}) + more)
    return task


def write_pictures(folder, split, rows):
    """A picture folder that `datasets` reads: (picture, fields) per row; fields stand in ``metadata.jsonl``."""
    place = folder / split
    place.mkdir(parents=True)
    lines = []
    for number, (picture, fields) in enumerate(rows):
        name = f"{number:03}{Path(picture).suffix}"
        shutil.copy(picture, place / name)
        lines.append(json.dumps({"file_name": name, **fields}) + "\n")
    (place / "metadata.jsonl").write_text("".join(lines))
    return {"path": "imagefolder", "data_dir": str(folder)}


def write_lines(path, split, rows):
    """JSON lines that `datasets` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": "json", "data_files": {split: str(path)}}


def write_clip(path, frames=12, rate=4):
    """A square that moves to the right."""
    import av
    import numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 64
        for number in range(frames):
            picture = numpy.full((64, 64, 3), 90, numpy.uint8)
            picture[20:40, 3 * number : 3 * number + 20] = (200, 40, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
