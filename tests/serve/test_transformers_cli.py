"""``--hf``: the command line on a model in the Transformers library's format."""

import io
import re

import pytest
from convert_to_transformers import convert

from llava.integrations.transformers import loading
from llava.model.builder import TOY_FOLDER
from llava.serve import cli
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


def test_the_same_answer_as_our_own_host(capsys, converted):
    question = ["--image-file", str(PICTURES[0]), "--keep-tokens", "64", "--query", "What color is the star?"]
    code, theirs, err = run(capsys, "--model-path", converted, "--clip-path", CLIP, *question)
    assert code == 0, err
    assert re.search(
        r"\[64 of 576 visual tokens \(64 x 1 per view\) \| first token \d+ ms \| decode [\d.]+ ms/token\]", theirs
    )
    _, ours, _ = run(capsys, "--model-path", str(TOY_FOLDER / "llava-toy-v1.5"), *question, hf=False)
    assert theirs.splitlines()[0] == ours.splitlines()[0]


def test_methods_inside_the_decoder_tell_what_is_left(capsys, converted):
    options = ["--pruner", "fastv", "--keep-tokens", "300", "--query", "What color is the star?"]
    code, out, err = run(capsys, "--model-path", converted, "--image-file", str(PICTURES[0]), *options)
    assert code == 0, err
    assert "[208 of 576 visual tokens (208 x 1 per view) left after the last cut in the decoder, 300.0 averaged" in out


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
