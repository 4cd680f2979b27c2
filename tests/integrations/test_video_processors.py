"""Videos through the library's real processors, which need torchvision: from a file to an answer."""

import re

import numpy as np
import pytest
import torch
import transformers as hf

pytest.importorskip("torchvision", reason="the library's video processors need torchvision", exc_type=Exception)
pytest.importorskip("av", reason="video files are read with PyAV")

import av

from llava.pruning import get_pruner
from llava.serve import cli
from llava.video import load_video, video_inputs
from video_processors import AROUND, MARKS, video_mark, write_checkpoint

FRAME = {"qwen3_vl": (32, 48), "llava_onevision": (28, 28), "onevision_1_5": (16, 24)}


@pytest.fixture(params=sorted(MARKS))
def checkpoint(request, tmp_path):
    """A tiny random model with its processor in a folder, and a file of two seconds."""
    write_checkpoint(request.param, tmp_path / "model")
    height, width = FRAME[request.param]
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        generator = np.random.default_rng(0)
        for _ in range(8):
            picture = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return request.param, tmp_path / "model", tmp_path / "clip.mp4"


def test_the_processor_sees_the_chosen_frames_and_their_times(checkpoint):
    name, folder, clip = checkpoint
    processor = hf.AutoProcessor.from_pretrained(folder)
    video = load_video(clip, 4)
    assert len(video.frames) == 4
    text = AROUND[name].format(video_mark(name)) + " w7"
    inputs = processor(text=[text], return_tensors="pt", **video_inputs([video]))
    tokens = int((inputs["input_ids"] == list(MARKS[name])[1]).sum())
    if name == "qwen3_vl":
        assert tokens == 2 * 4 * 6  # pairs of frames, 8 x 12 patches in groups of four
        given = video_inputs([video])["video_metadata"][0]
        times = [index / given["fps"] for index in given["frames_indices"]]
        assert times == pytest.approx([t - video.times[0] + times[0] for t in video.times])
    elif name == "onevision_1_5":
        assert tokens == 4 * 4 * 6  # each frame apart, 8 x 12 patches in groups of four
        assert inputs["video_grid_thw"].tolist() == [[4, 8, 12]]
    else:
        assert tokens == 4 * 4 + 1  # pooled 2 x 2, and a newline


def test_pruned_through_the_processor(checkpoint):
    """Keeping all is the unpruned model; a budget holds on every frame or pair of frames."""
    _, folder, clip = checkpoint
    processor = hf.AutoProcessor.from_pretrained(folder)
    model = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "w7 w8"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, return_tensors="pt", **video_inputs([load_video(clip, 4)]))
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.inference_mode():
        unpruned = model.generate(**inputs, **options)
        with get_pruner("divprune", keep_tokens=500)(model):
            assert torch.equal(model.generate(**inputs, **options), unpruned)
        with get_pruner("script", keep_tokens=3)(model, processor) as handle:
            model.generate(**inputs, **options)
    assert {count for one in handle.kept for count in one.per_view} == {3}


def test_the_command_line(checkpoint, capsys):
    name, folder, clip = checkpoint
    arguments = [
        "--hf",
        "--device",
        "cpu",
        "--model-path",
        str(folder),
        "--video-file",
        str(clip),
        "--num-frames",
        "4",
    ]
    arguments += ["--query", "w7 w8", "--max-new-tokens", "4"]
    for keep, wanted in ((["--keep-tokens", "3"], "pruned"), ([], "all")):
        assert cli.main([*arguments, *keep]) == 0
        printed = capsys.readouterr().out
        kept, of = map(int, re.search(r"\[(\d+) of (\d+) visual tokens", printed).groups())
        views = 2 if name == "qwen3_vl" else 4
        assert kept == (3 * views if wanted == "pruned" else of)
        assert of >= 16
    assert cli.main([*arguments, "--show-tokens", str(folder / "x.png")]) == 2
    assert "draws pictures, not videos" in capsys.readouterr().err
