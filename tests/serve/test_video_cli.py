"""The command line on videos: counts per frame, several turns, a contact sheet, and errors before work starts."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from llava.layout import views
from llava.serve import cli
from records import GOLDEN


@pytest.fixture
def run(capsys, video):
    def run(*arguments, checkpoint="llava-video-tiny-qwen2", source="frames/clipA"):
        shown = ["--video-file", str(video / source)] if source else []
        options = ["--model-path", str(video / "checkpoints" / checkpoint), "--device", "cpu", "--max-new-tokens", "3"]
        code = cli.main([*options, *shown, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_tokens_per_frame(run):
    code, out, err = run(
        "--query", "What moves?", "--num-frames", "3", "--keep-tokens", "32", "--pool-mode", "average"
    )
    assert code == 0, err
    assert re.search(r"\[96 of 507 visual tokens \(32 x 3 per view\) \| vision \d+ ms \| selection [\d.]+ ms", out)


def test_unpruned_with_the_checkpoints_newlines(run):
    code, out, _ = run("--query", "What moves?", "--num-frames", "4")
    assert code == 0
    assert "784 of 784 visual tokens (196 x 4 per view, and 56 newlines), nothing pruned" in out
    code, out, _ = run("--query", "What moves?", "--num-frames", "4", checkpoint="llava-onevision-tiny-qwen2-ov")
    assert code == 0
    assert "784 of 784 visual tokens (196 x 4 per view, and 1 newlines), nothing pruned" in out


def test_a_picture_that_the_model_shrinks_says_so(run, video, monkeypatch):
    monkeypatch.setattr(views, "SHRINK_ABOVE", 0.5)  # no golden picture is large enough for a maximum of nine
    views.tiled_layout.cache_clear()
    shown = ["--image-file", str(video / "images/wide1500x300.png")]
    code, out, err = run("--query", "What?", *shown, checkpoint="llava-onevision-tiny-qwen2-ov", source=None)
    views.tiled_layout.cache_clear()
    assert code == 0, err
    assert re.search(
        r"\d+ of 3645 visual tokens \(resized by the model itself, and \d+ newlines\), nothing pruned", out
    )


def test_several_pictures_are_a_padded_square_each(run, video):
    """As the published code evaluates them; one picture is tiles again."""
    files = [str(video / "images" / f"{name}.png") for name in ("small320x240", "wide1500x300")]
    options = {"checkpoint": "llava-onevision-tiny-qwen2-ov", "source": None}
    code, out, err = run("--query", "What?", "--keep-tokens", "32", "--image-file", *files, **options)
    assert code == 0, err
    assert "64 of 1458 visual tokens (32 x 2 per view)" in out
    code, out, err = run("--query", "What?", "--image-file", *files, **options)
    assert "1458 of 1458 visual tokens (729 x 2 per view, and 2 newlines)" in out
    code, out, err = run("--query", "What?", "--keep-tokens", "32", "--image-file", files[1], **options)
    assert re.search(r"\(32 x ([2-9]|\d\d) per view\)", out)


def test_a_budget_for_the_whole_video(run):
    options = ["--num-frames", "4", "--keep-tokens", "16", "--pruner-args", "scope=global"]
    code, out, _ = run("--query", "What moves?", *options)
    assert code == 0
    assert "64 of 784 visual tokens" in out
    assert "16 x 4 per view" not in out


def test_several_turns_about_one_video(run, monkeypatch, video):
    lines = [
        "What moves?",
        "/keep 9",
        "And then?",
        f"/video {video / 'frames/clipB'}",
        "What?",
        "/video gone.mp4",
        "/quit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, _ = run("--keep-tokens", "16", "--num-frames", "4")
    assert code == 0
    assert re.findall(r"(\d+) of (\d+) visual tokens \((\d+) x 4", out) == [
        ("64", "784", "16"),
        ("36", "784", "9"),
        ("36", "784", "9"),
    ]
    assert out.count("vision cached") == 1
    assert "error: no video file or folder of frames at gone.mp4" in out


def test_contact_sheet_of_kept_tokens(run, tmp_path):
    sheets = []
    for keep in ("full", "16"):
        options = ["--num-frames", "9", "--pool-mode", "average", "--show-tokens", str(tmp_path / "sheet.png")]
        code, _, err = run("--query", "What?", "--keep-tokens", keep, *options, source="frames/clipB")
        assert code == 0, err
        sheets.append(np.asarray(Image.open(tmp_path / "sheet.png")).astype(float))
    plain, pruned = sheets
    assert plain.shape == (2 * 384 + 8, 8 * 384 + 7 * 8, 3)
    first = (slice(0, 364), slice(0, 364))
    same = (plain[first] == pruned[first]).all(-1).reshape(13, 28, 13, 28).all((1, 3))
    assert same.sum() == 16
    assert (plain[364:384, :384] == pruned[364:384, :384]).all()  # no token shows the rest of a frame: dim in both


def test_repetition_penalty_is_the_checkpoints_unless_given(run):
    answers = []
    for options in ([], ["--repetition-penalty", "8.0"]):
        code, out, _ = run("--query", "What?", "--num-frames", "2", *options, "--max-new-tokens", "12")
        assert code == 0
        answers.append(out.splitlines()[0])
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    "arguments, source, message",
    [
        ([], "nowhere.mp4", "no video file or folder of frames at .*nowhere.mp4"),
        (["--num-frames", "0"], "frames/clipA", "at least one frame, got 0"),
        (["--image-file", "a.png"], "frames/clipA", "exclude each other"),
        ([], "records", "holds no frames"),
        (["--query", "<image> <image>?"], "frames/clipA", "2 <image> placeholders, but there are 1 images"),
    ],
)
def test_bad_input_is_answered_before_the_model_is_loaded(run, monkeypatch, arguments, source, message):
    monkeypatch.setattr(cli, "load_pretrained_model", None)
    query = [] if "--query" in arguments else ["--query", "What?"]
    code, out, err = run(*query, *arguments, source=source)
    assert code == 2
    assert out == ""
    assert re.search(message, err)


def test_a_checkpoint_of_pictures_says_that_it_takes_no_videos(run):
    code, _, err = run("--query", "What?", "--model-path", str(GOLDEN / "checkpoints/llava-v1.5-tiny"))
    assert code == 2
    assert "not made for videos" in err
