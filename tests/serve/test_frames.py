"""Where the tokens of a video stand in its frames, on the library's own classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.pruning import get_pruner
from llava.serve.viewer.frames import seen_frames
from llava.video import Video
from transformers_families import family

HALVES = SimpleNamespace(video_processor=SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3))


@pytest.mark.parametrize(("name", "joined"), [("llava_onevision", 1), ("qwen2_5_vl", 2), ("qwen3_vl", 2)])
def test_tokens_stand_in_the_frames_that_they_show(name, joined):
    one = family(name)
    arguments = one.prompts([[3, "video", 4]], [], video=True)
    shades = [10 * number for number in range(3 * joined)]
    video = Video([Image.new("RGB", (30, 20), (shade,) * 3) for shade in shades], list(range(len(shades))))
    with torch.no_grad(), get_pruner("uniform", keep_tokens=2)(one.model, keep_features=True) as handle:
        one.model(**arguments)
    (kept,) = handle.kept
    seen = seen_frames(one.model, HALVES, arguments, video, handle.kept)
    whole = seen_frames(one.model, HALVES, arguments, video, None)
    assert len(seen) == 3
    assert [int(frame.at(kept.kept).sum()) for frame in seen] == [2] * 3
    for number, frame in enumerate(seen):
        assert (kept.picture.views[frame.tokens] == number).all()
        if joined == 2:
            assert frame.colours.shape[:2] == tuple(8 * n for n in frame.tokens.shape)  # 4 pixels, 2 x 2 joined
            assert (frame.colours == shades[2 * number]).all()
        else:
            pixels = arguments["pixel_values_videos"][0, number].clamp(-1, 1) * 127.5 + 127.5
            assert np.abs(frame.colours - pixels.permute(1, 2, 0).numpy()).max() <= 1
    assert [frame.tokens.tolist() for frame in whole] == [frame.tokens.tolist() for frame in seen]
    assert kept.features.shape == (len(kept.kept), one.model.get_input_embeddings().embedding_dim)


def test_tokens_that_stand_nowhere_are_refused():
    one = family("video_llava")  # a class token in each frame
    arguments = one.prompts([[3, "video", 4]], [], video=True)
    with pytest.raises(ValueError, match="make no 3 frames"):
        seen_frames(one.model, HALVES, arguments, Video([Image.new("RGB", (9, 9))] * 3, [0, 1, 2]), None)
