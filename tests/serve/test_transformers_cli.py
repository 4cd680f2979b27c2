"""``--hf``: the command line on a model in the Transformers library's format."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from convert_to_transformers import convert
from PIL import Image

from llava.integrations.transformers import loading
from llava.model.builder import TOY_FOLDER
from llava.serve import cli
from llava.serve.status import TimedStreamer
from llava.serve.transformers_picture import check_drawable, draw_kept
from records import GOLDEN

CLIP = str(TOY_FOLDER / "clip-toy-336")
PICTURES = sorted((TOY_FOLDER / "data/eval/MME/MME_Benchmark_release_version/color").glob("*.png"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "llava-toy-v1.5"
    convert(str(TOY_FOLDER / "llava-toy-v1.5"), target)
    return str(target)


def run(capsys, *arguments, hf=True):
    code = cli.main([*(["--hf"] if hf else []), "--device", "cpu", "--max-new-tokens", "4", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_same_answer_as_our_own_host(capsys, converted, tmp_path):
    """Of a square picture: the library's class does not tell which patches show only padding."""
    with Image.open(PICTURES[0]) as picture:
        side = min(picture.size)
        picture.crop((0, 0, side, side)).resize((336, 336)).save(tmp_path / "a.png")
    question = ["--image-file", str(tmp_path / "a.png"), "--keep-tokens", "64", "--query", "What color is the star?"]
    code, theirs, err = run(capsys, "--model-path", converted, "--clip-path", CLIP, *question)
    assert code == 0, err
    assert re.search(
        r"\[64 of 576 visual tokens \(64 x 1 per view\) \| vision \d+ ms \| selection \d+ ms \| prefill \d+ ms \| "
        r"decode [\d.]+ ms/token\]",
        theirs,
    )
    _, ours, _ = run(capsys, "--model-path", str(TOY_FOLDER / "llava-toy-v1.5"), *question, hf=False)
    assert theirs.splitlines()[0] == ours.splitlines()[0]


def test_methods_inside_the_decoder_tell_what_is_left(capsys, converted):
    options = ["--pruner", "fastv", "--keep-tokens", "300", "--query", "What color is the star?"]
    code, out, err = run(capsys, "--model-path", converted, "--image-file", str(PICTURES[0]), *options)
    assert code == 0, err
    assert "[261 of 576 visual tokens (261 x 1 per view) left after the last cut in the decoder, 300.4 averaged" in out


def test_a_conversation(capsys, converted, monkeypatch):
    lines = [
        "What color is the star?",
        "/keep 16",
        "Is there a cup?",
        "/pruner downsample",
        "/clear",
        "Is there a star?",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "/quit"])))
    code, out, err = run(capsys, "--model-path", converted, "--image-file", str(PICTURES[0]), str(PICTURES[1]))
    assert code == 0, err
    assert "1152 of 1152 visual tokens, nothing pruned" in out
    assert out.count("32 of 1152 visual tokens (16 x 2 per view)") == 2
    assert "error: pruner 'downsample' acts on the pixels" in out


def test_bad_input(capsys, converted, monkeypatch):
    def refused(*arguments, **options):
        code, _, err = run(capsys, *arguments, "--query", "What?", **options)
        assert code == 2
        assert len(err.strip().splitlines()[-1:]) == 1
        return err

    assert "--conv-mode goes with LLaVA's own code" in refused("--model-path", converted, "--conv-mode", "vicuna_v1")
    assert "--clip-path goes with --hf" in refused("--clip-path", CLIP, hf=False)
    assert "no model of the Transformers library at nowhere/none" in refused("--model-path", "nowhere/none")
    assert "leave --hf out" in refused("--model-path", str(GOLDEN / "checkpoints/llava-v1.5-tiny-wide"))
    assert "'downsample' acts on the pixels" in refused(
        "--model-path", converted, "--pruner", "downsample", "--keep-tokens", "64"
    )

    class WithoutTorchvision:
        @staticmethod
        def from_pretrained(name):
            raise ImportError("LlavaOnevisionVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(loading, "AutoProcessor", WithoutTorchvision)
    assert 'pip install "script-llava[hf]"' in refused("--model-path", converted)


def drawn(capsys, out_file, *arguments, **options):
    code, _, err = run(capsys, *arguments, "--query", "What?", "--show-tokens", str(out_file), **options)
    assert code == 0, err
    return np.asarray(Image.open(out_file)).astype(int)


@pytest.mark.parametrize("source", ["llava-toy-v1.5", "llava-v1.6-vicuna-tiny"])
def test_kept_tokens_are_drawn_as_our_own_host_draws_them(capsys, converted, tmp_path, source):
    original, theirs = str(TOY_FOLDER / source), converted
    files = [str(GOLDEN / "images" / "square336.png")] * 2
    if source != "llava-toy-v1.5":
        original, theirs = str(GOLDEN / "checkpoints" / source), tmp_path / "hf"
        convert(original, theirs)
        files = [str(GOLDEN / "images" / f"{name}.png") for name in ("wide1000x400", "tall300x900")]
    for shown in (["--image-file", *files, "--pruner", "divprune", "--keep-tokens", "25"], ["--image-file", files[0]]):
        one = drawn(capsys, tmp_path / "one.png", "--model-path", str(theirs), *shown)
        two = drawn(capsys, tmp_path / "two.png", "--model-path", original, *shown, hf=False)
        assert one.shape == two.shape
        assert np.abs(one - two).max() <= 2


def test_one_grid_of_any_shape_is_drawn_over_its_picture():
    """Qwen2-VL's kind: 4 x 6 tokens, each of 2 x 2 patches of 14 pixels."""
    vision = SimpleNamespace(spatial_merge_size=2, patch_size=14)
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen2_vl", vision_config=vision))
    inputs = {"image_grid_thw": torch.tensor([[1, 8, 12]])}
    kept = torch.zeros(24, dtype=torch.bool)
    kept[[0, 23, 8]] = True
    white = Image.new("RGB", (168, 112), (255, 255, 255))
    picture = np.asarray(draw_kept(model, None, inputs, [white], [SimpleNamespace(kept=kept)]))[..., 0]
    lit = picture.reshape(4, 28, 6, 28).min((1, 3)) == 255
    assert lit.flatten().nonzero()[0].tolist() == [0, 8, 23]


def test_where_tokens_stand_is_known_or_refused():
    encoder = SimpleNamespace(place="encoder", name="pool")
    model = SimpleNamespace(config=SimpleNamespace(model_type="llava_next"))
    with pytest.raises(ValueError, match="pruner 'pool' makes tokens of many patches"):
        check_drawable(model, {}, encoder)


def test_a_processor_without_patch_size_is_told_in_a_sentence(capsys, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "old")
    settings = json.loads((folder / "processor_config.json").read_text())
    del settings["patch_size"], settings["num_additional_image_tokens"]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    code, _, err = run(capsys, "--model-path", str(folder), "--query", "What?", "--image-file", str(PICTURES[0]))
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "does not say patch_size" in last
    assert (
        "add 'patch_size': 14, 'vision_feature_select_strategy': 'default', 'num_additional_image_tokens': 1" in last
    )


def test_sizes_that_no_model_has_are_refused_before_it_is_built(capsys, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "large")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["num_hidden_layers"] = 10**6
    (folder / "config.json").write_text(json.dumps(settings))
    code, _, err = run(capsys, "--model-path", str(folder), "--query", "What?")
    assert code == 2
    assert "says num_hidden_layers=1000000, expected a whole number from 1 to 1024" in err


def test_a_thin_picture_is_refused_before_it_grows(capsys, converted, tmp_path):
    Image.new("1", (1, 20000)).save(tmp_path / "strip.png")
    code, _, err = run(capsys, "--model-path", converted, "--query", "?", "--image-file", str(tmp_path / "strip.png"))
    assert code == 2
    assert "becomes 20000 x 20000 when padded to a square" in err


def test_ctrl_c_stops_the_answer_and_not_the_chat(capsys, converted, monkeypatch):
    put = TimedStreamer.put

    def interrupted(self, value):
        put(self, value)
        if len(self.times) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TimedStreamer, "put", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("What color is the star?\nAnd now?\n/help\n"))
    code, out, err = run(
        capsys, "--model-path", converted, "--image-file", str(PICTURES[0]), "--pruner", "grid", "--keep-tokens", "16"
    )
    assert code == 0, err
    assert out.count("[stopped]") == 2
    assert out.count("16 of 576 visual tokens") == 2
    assert re.search(rf"picture  {PICTURES[0].name}: \d+ x \d+ pixels\n", out)
    assert "model    llava-toy-v1.5 (LlavaForConditionalGeneration, cpu, float32)" in out
