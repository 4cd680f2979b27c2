"""Videos at the paper's budgets on the library's own classes: 64 frames of 169 tokens, 64, 32 or 16 kept of each."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from llava.pruning import get_pruner
from llava.video import load_video
from transformers_families import IMAGE, TEXT, TOWER, VIDEO, built

FRAMES = 64


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Frames of a clip made here, read back as any video: an mp4 file where PyAV is there, else a folder."""
    folder = tmp_path_factory.mktemp("clip")
    pictures = []
    for number in range(80):
        picture = np.full((120, 160, 3), 60, dtype=np.uint8)
        picture[40:80, number : number + 40] = (220, 40, 40)
        pictures.append(picture)
    try:
        import av
    except ImportError:
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{number}.png")
        return load_video(folder, FRAMES).frames
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return load_video(folder / "clip.mp4", FRAMES).frames


def pixels_of(frames, side):
    """(1, T, 3, side, side), as the video processors give them; these need torchvision, which is not at hand."""
    resized = [np.asarray(frame.resize((side, side), Image.Resampling.BICUBIC)) for frame in frames]
    return torch.stack([torch.tensor(frame).permute(2, 0, 1) / 127.5 - 1 for frame in resized])[None]


def onevision():
    """13 x 13 tokens a frame after pooling, and one newline at the end."""
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER | {"image_size": 364, "patch_size": 14, "num_hidden_layers": 1}),
        text_config=hf.Qwen2Config(**TEXT | {"max_position_embeddings": 16384}),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return built(hf.LlavaOnevisionForConditionalGeneration, config), 364, 169, 1


def video_llava():
    """256 patches and the class token of each frame."""
    config = hf.VideoLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER | {"image_size": 224, "patch_size": 14}),
        text_config=hf.LlamaConfig(**TEXT | {"max_position_embeddings": 4096}),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return built(hf.VideoLlavaForConditionalGeneration, config), 224, 257, 0


@pytest.mark.parametrize("keep", [64, 32, 16])
@pytest.mark.parametrize(("make", "frames"), [(onevision, 64), (video_llava, 8)])
def test_tokens_per_frame_and_memory(clip, make, frames, keep):
    model, side, tokens, newlines = make()
    shown = [clip[round(number * (len(clip) - 1) / (frames - 1))] for number in range(frames)]
    ids = torch.tensor([[1, 5, *[VIDEO] * (frames * tokens + newlines), 6, 7, 8]])
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels_of(shown, side),
    }
    pruner = get_pruner("script", keep_tokens=keep, relevance="none")
    with torch.no_grad(), pruner(model) as handle:
        output = model.generate(**arguments, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert handle.kept[0].tokens == frames * tokens
    assert handle.kept[0].per_view == [keep] * frames
    assert handle.kept[0].separators == 0
    assert torch.equal(output.sequences[:, :-2], ids)
    length = 5 + frames * keep + 1
    cache = output.past_key_values
    assert cache.get_seq_length() == length
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    width = TEXT["num_key_value_heads"] * TEXT["hidden_size"] // TEXT["num_attention_heads"]
    assert held == 2 * 4 * TEXT["num_hidden_layers"] * width * length


def test_one_budget_for_the_clip(clip):
    """Script deals out twice as many tokens as frames over the clip.

    Few, so that the 32-wide features have a rank to spare: beyond it the last bits of the sums decide.
    """
    model, side, tokens, newlines = onevision()
    ids = torch.tensor([[1, *[VIDEO] * (8 * tokens + newlines), 6, 7]])
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels_of(clip[:8], side),
    }
    pruner = get_pruner("script", keep_tokens=2, relevance="none", scope="global")
    with torch.no_grad(), pruner(model) as handle:
        model(**arguments)
    assert sum(handle.kept[0].per_view) == 16
    assert len(set(handle.kept[0].per_view)) > 1
