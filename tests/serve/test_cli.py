"""The command line: answers, status line, pictures of kept tokens, conversation, and errors before work starts."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from llava.pruning import list_pruners
from llava.serve import cli
from records import GOLDEN

V15, V16 = (str(GOLDEN / "checkpoints" / name) for name in ("llava-v1.5-tiny-wide", "llava-v1.6-vicuna-tiny-wide"))
PICTURE, SQUARE = (str(GOLDEN / "images" / f"{name}.png") for name in ("land640x480", "square336"))


def run(capsys, *arguments, model=V15, image=PICTURE):
    pictures = ["--image-file", *image.split()] if image else []
    code = cli.main(["--model-path", model, *pictures, "--max-new-tokens", "3", "--device", "cpu", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_status_line_tells_counts_and_times(capsys):
    code, out, _ = run(capsys, "--query", "What is it?", "--keep-tokens", "64")
    assert code == 0
    pattern = (
        r"\[64 of 576 visual tokens \(64 x 1 per view\) \| vision \d+ ms \| selection [\d.]+ ms( \| .*tau)? "
        r"\| prefill \d+ ms \| decode [\d.]+ ms/token\]"
    )
    assert re.search(pattern, out)


def test_methods_inside_the_decoder_tell_what_is_left_and_draw_it(capsys, tmp_path):
    out_file = tmp_path / "kept.png"
    arguments = ("--pruner", "fastv", "--keep-tokens", "300", "--show-tokens", str(out_file))
    code, out, _ = run(capsys, "--query", "What is it?", *arguments, image=SQUARE)
    assert code == 0
    assert "[24 of 576 visual tokens (24 x 1 per view) left after the last cut in the decoder, 300.0 averaged" in out
    assert "nothing pruned" not in out
    dark = np.asarray(Image.open(out_file)).astype(float)
    code, out, _ = run(
        capsys, "--query", "What is it?", "--pruner", "fastv", "--show-tokens", str(out_file), image=SQUARE
    )
    assert "nothing pruned" in out
    same = (dark == np.asarray(Image.open(out_file)))[:336].all(-1).reshape(24, 14, 24, 14).all((1, 3))
    assert 24 <= same.sum() < 300


def test_tiles_and_several_questions(capsys, tmp_path):
    out_file = tmp_path / "kept.png"
    code, out, _ = run(
        capsys, "--query", "What is it?", "A dog?", "--keep-tokens", "32", "--show-tokens", str(out_file), model=V16
    )
    assert code == 0
    assert out.count("160 of 2880 visual tokens (32 x 5 per view)") == 2
    assert out.count("vision cached") == 1
    drawn = np.asarray(Image.open(out_file))  # panels of a picture and a line each for question and answer
    height = (len(drawn) - 8) // 2
    assert drawn.shape[1] == 336 + 8 + 672
    assert height > 672
    assert (drawn[:672] != drawn[height + 8 :][:672]).any()  # another question keeps other tokens


def test_dropped_patches_are_dimmed_and_kept_ones_are_not(capsys, tmp_path):
    shown = []
    for keep in ("full", "576", "16"):
        code, out, _ = run(
            capsys, "--query", "What?", "--keep-tokens", keep, "--show-tokens", str(tmp_path / "o.png"), image=SQUARE
        )
        assert code == 0
        assert ("nothing pruned" in out) is (keep != "16")
        shown.append(np.asarray(Image.open(tmp_path / "o.png")).astype(float)[:336])  # without the caption
    plain, above, pruned = shown
    assert (plain == above).all()
    patches = (plain == pruned).all(-1).reshape(24, 14, 24, 14).all((1, 3))
    dimmed = ~patches & (plain.reshape(24, 14, 24, 14, 3).max((1, 3, 4)) > 8)
    assert patches.sum() >= 16
    assert dimmed.sum() > 400


def test_other_methods_and_options(capsys):
    for arguments in (
        ("--pruner", "random", "--pruner-args", "seed=3"),
        ("--pruner-args", "relevance=projector", "tau=0.8", "gsp_ratio=0.25"),
        ("--pruner", "grid", "--dtype", "bfloat16"),
    ):
        code, out, err = run(capsys, "--query", "What?", "--keep-tokens", "25", *arguments)
        assert code == 0, err
        assert "25 of 576" in out


def test_newlines_and_forced_grid(capsys):
    code, out, _ = run(
        capsys, "--query", "What?", "--keep-tokens", "9", "--pruner-args", "newlines=keep", model=V16, image=SQUARE
    )
    assert code == 0
    assert re.search(r"27 of 1728 visual tokens \(9 x 3 per view, and \d+ newlines\)", out)
    code, out, _ = run(
        capsys, "--query", "What?", "--keep-tokens", "9", "--image-grid", "672x672", model=V16, image=SQUARE
    )
    assert code == 0
    assert "45 of 2880" in out


def test_two_pictures_and_none(capsys):
    code, out, _ = run(capsys, "--query", "Compare.", "--keep-tokens", "8", image=f"{PICTURE} {SQUARE}")
    assert code == 0
    assert "16 of 1152 visual tokens (8 x 2 per view)" in out
    code, out, _ = run(capsys, "--query", "Hello?", "--keep-tokens", "8", image=None)
    assert code == 0
    assert "visual" not in out


def test_sampling_and_separator_templates(capsys):
    code, out, _ = run(capsys, "--query", "What?", "--temperature", "0.7", "--top-p", "0.9", "--conv-mode", "llava_v0")
    assert code == 0
    assert "nothing pruned" in out


def test_conversation(capsys, monkeypatch):
    lines = ["What is it?", "/keep 16", "And now?", "/pruner uniform", "Again?"]
    lines += ["/nonsense", "/keep 0", "/pruner best", f"/image {SQUARE} {PICTURE}", "Both?"]
    lines += ["/image /gone.png", "/clear", "/keep full", "All?", "", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, _ = run(capsys, "--keep-tokens", "64")
    assert code == 0
    counts = re.findall(r"(\d+) of (\d+) visual tokens", out)
    assert counts == [("64", "576"), ("16", "576"), ("16", "576"), ("32", "1152"), ("1152", "1152")]
    assert out.count("vision cached") == 3
    assert "unknown command /nonsense" in out
    assert "error: keep_tokens must be a count" in out
    assert "error: unknown pruner 'best'; known pruners:" in out
    assert "error: no image file at /gone.png" in out


def test_end_of_input_ends_the_chat(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(capsys)[0] == 0


@pytest.mark.parametrize(
    "arguments, image, message",
    [
        (["--keep-tokens", "0"], PICTURE, "keep_tokens must be a count .* got 0"),
        (["--keep-tokens", "-3"], PICTURE, "got -3"),
        (["--keep-tokens", "1.5"], PICTURE, "got 1.5"),
        (["--keep-tokens", "lots"], PICTURE, "got 'lots'"),
        (["--pruner", "scirpt"], PICTURE, f"unknown pruner 'scirpt'; known pruners: {', '.join(list_pruners())}"),
        (["--pruner-args", "tua=1"], PICTURE, "no option tua; its options: .*tau"),
        (["--image-grid", "big"], PICTURE, "WIDTHxHEIGHT"),
        ([], "/gone.png", "no image file at /gone.png"),
        ([], V15 + "/config.json", "is not an image"),
        (["--query", "<image> <image> same?"], PICTURE, "2 <image> placeholders, but there are 1 images"),
        (["--query", "<image> what?"], None, "1 <image> placeholders, but there are 0 images"),
    ],
)
def test_bad_input_is_answered_before_the_model_is_loaded(capsys, monkeypatch, arguments, image, message):
    monkeypatch.setattr(cli, "load_pretrained_model", None)
    query = [] if "--query" in arguments else ["--query", "What?"]
    code, out, err = run(capsys, *query, *arguments, image=image)
    assert code == 2
    assert out == ""
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_missing_checkpoint(capsys):
    code, _, err = run(capsys, "--query", "What?", model="/nowhere/llava")
    assert code == 2
    assert "no checkpoint at /nowhere/llava" in err


def test_prompt_over_the_context_is_refused(capsys):
    code, _, err = run(capsys, "--query", "What?", image=" ".join([PICTURE] * 8))
    assert code == 2
    assert "longer than the model's context of 4096; use fewer images, or keep fewer tokens" in err
    code, out, _ = run(capsys, "--query", "What?", "--keep-tokens", "32", image=" ".join([PICTURE] * 8))
    assert code == 0
    assert "256 of 4608" in out
