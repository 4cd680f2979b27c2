"""The command line: answers, status line, pictures of kept tokens, conversation, and errors before work starts."""

import io
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from llava.pruning import list_pruners
from llava.serve import chat, cli
from llava.serve.status import TimedStreamer
from llava.terminal import printable
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
    same = (dark == np.asarray(Image.open(out_file))).all(-1).reshape(24, 14, 24, 14).all((1, 3))
    assert 24 <= same.sum() < 300


def test_tiles_and_several_questions(capsys, tmp_path):
    out_file = tmp_path / "kept.png"
    code, out, _ = run(
        capsys, "--query", "What is it?", "A dog?", "--keep-tokens", "32", "--show-tokens", str(out_file), model=V16
    )
    assert code == 0
    assert out.count("160 of 2880 visual tokens (32 x 5 per view)") == 2
    assert out.count("vision cached") == 1
    first, second = (np.asarray(Image.open(path)) for path in (out_file, tmp_path / "kept-2.png"))
    assert first.shape == (672, 336 + 8 + 672, 3)
    assert (first != second).any()  # another question keeps other tokens


def test_captions_put_all_questions_in_one_picture(capsys, tmp_path):
    out_file = tmp_path / "kept.png"
    questions, flags = ("--query", "What is it?", "A dog?"), ("--keep-tokens", "32", "--show-tokens", str(out_file))
    code, _, _ = run(capsys, *questions, *flags, "--captions", model=V16)
    assert code == 0
    drawn = np.asarray(Image.open(out_file))  # panels of a picture and a line each for question and answer
    height = (len(drawn) - 8) // 2
    assert drawn.shape[1] == 336 + 8 + 672
    assert height > 672
    assert (drawn[:672] != drawn[height + 8 :][:672]).any()
    assert not (tmp_path / "kept-2.png").exists()
    assert run(capsys, *questions, "--captions", model=V16)[0] == 2  # nothing to write under


def test_dropped_patches_are_dimmed_and_kept_ones_are_not(capsys, tmp_path):
    shown = []
    for keep in ("full", "576", "16"):
        code, out, _ = run(
            capsys, "--query", "What?", "--keep-tokens", keep, "--show-tokens", str(tmp_path / "o.png"), image=SQUARE
        )
        assert code == 0
        assert ("nothing pruned" in out) is (keep != "16")
        shown.append(np.asarray(Image.open(tmp_path / "o.png")).astype(float))
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
    assert "error: unknown command /nonsense; /help lists the commands" in out
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
        (
            ["--keep-tokens", "auto:95"],
            PICTURE,
            "keep_tokens=auto:95: the share to explain lies above 0 and is at most 1",
        ),
        (
            ["--keep-tokens", "auto", "--pruner", "grid"],
            PICTURE,
            "'grid' needs a count or a share: .* cdpruner, mmtok",
        ),
        (["--pruner", "scirpt"], PICTURE, f"unknown pruner 'scirpt'; known pruners: {', '.join(list_pruners())}"),
        (["--pruner-args", "tua=1"], PICTURE, "no option tua; its options: .*tau"),
        (["--image-grid", "big"], PICTURE, "WIDTHxHEIGHT"),
        ([], "/gone.png", "no image file at /gone.png"),
        ([], V15 + "/config.json", "is not an image"),
        (["--device", "mps"], PICTURE, "device must be auto, cpu, cuda or cuda:<number>, got 'mps'"),
        (["--top-p", "3"], PICTURE, "--top-p must be more than 0 and at most 1, got 3"),
        (["--top-p", "0"], PICTURE, "--top-p must be more than 0"),
        (["--temperature", "-1"], PICTURE, r"--temperature must be 0 \(greedy\) or more, got -1"),
        (["--temperature", "nan"], PICTURE, "--temperature must be"),
        (["--repetition-penalty", "0"], PICTURE, "--repetition-penalty must be more than 0"),
        (["--max-new-tokens", "0"], PICTURE, "--max-new-tokens must be 1 or more, got 0"),
        (["--show-tokens", "/nowhere/out.png"], PICTURE, "there is no folder /nowhere"),
        (["--show-tokens", "out"], PICTURE, "the ending says no format of pictures"),
        (["--show-tokens", "/dev/full"], PICTURE, "--show-tokens /dev/full"),
        (["--show-tokens", str(GOLDEN / "images") + "/."], PICTURE, "--show-tokens"),
        (["--pruner", "\x1b]0;title\x07"], PICTURE, r"unknown pruner '\\x1b\]0;title\\x07'"),
        ([], "\x1b[31mred.png", r"no image file at \\x1b\[31mred\.png"),
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


# --- the chat ------------------------------------------------------------------------------------------------------


def talk(capsys, monkeypatch, *lines, arguments=()):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    return out


def test_the_chat_begins_with_what_is_in_use_and_lists_its_commands(capsys, monkeypatch):
    out = talk(capsys, monkeypatch, "/help", arguments=("--keep-tokens", "64"))
    assert "model    llava-v1.5-tiny-wide (template vicuna_v1, cpu, float32)" in out
    assert "method   script, 64 visual tokens of each view" in out
    assert "picture  land640x480.png: 576 visual tokens in 1 view\n" in out
    assert all(f"\n{name} " in out.replace("you: ", "\n") for name in chat.COMMANDS)


def test_a_budget_that_finds_itself_is_shown(capsys, monkeypatch):
    out = talk(capsys, monkeypatch, "What is there?", "/keep auto:0.5:floor=2", arguments=("--keep-tokens", "auto"))
    assert "method   script, as many visual tokens of each view as it takes (auto:0.95)" in out
    shown = int(re.search(r"\[(\d+) of 576 visual tokens", out)[1])
    assert 16 <= shown <= 192
    assert "[method: script, as many visual tokens of each view as it takes (auto:0.5:floor=2)]" in out


def test_every_command_says_what_it_did(capsys, monkeypatch):
    lines = [f"/image {SQUARE}", "/keep 0.25", "/pruner uniform", "/keep full", "/clear", "/pruner", "/keep"]
    out = talk(capsys, monkeypatch, *lines)
    said = [line.removeprefix("you: ") for line in out.splitlines()[4:]]
    assert said[:5] == [
        "[square336.png: 576 visual tokens in 1 view; a new conversation]",
        "[method: script, 25% of the visual tokens of each view]",
        "[method: uniform, 25% of the visual tokens of each view]",
        "[uniform without a budget: nothing is pruned. Say how many visual tokens it keeps of each view, a count or a "
        "share (--keep-tokens 64, in the chat /keep 64)]",
        "[conversation forgotten, pictures kept]",
    ]
    assert said[5].startswith("error: /pruner NAME [key=value ...]; methods: cdpruner, ")
    assert said[6] == "error: /keep N|auto|full; now: full"


def test_paths_are_read_as_a_shell_reads_them(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my picture.png", "it's.png", "plain.png"):
        shutil.copy(SQUARE, tmp_path / name)
    folder = str(tmp_path)
    lines = [
        f'/image "{folder}/my picture.png"',
        f"/image {folder}/my picture.png",
        f"/image {folder}/my\\ picture.png",
    ]
    lines += ["/image ~/plain.png", "/image '~/plain.png' \"~/my picture.png\"", f"/image {folder}/it's.png"]
    lines += ["/image 'open", "/image", "~/plain.png", "/image", "", "/clear", "/video"]
    out = talk(capsys, monkeypatch, *lines)
    said = [line.split("you: ")[-1] for line in out.splitlines()[4:]]
    tokens = "576 visual tokens in 1 view; a new conversation]"
    assert said[:3] == [f"[my picture.png: {tokens}"] * 3
    assert said[3] == f"[plain.png: {tokens}"
    assert said[4] == "[plain.png, my picture.png: 1152 visual tokens in 2 views; a new conversation]"
    assert said[5] == f"[it's.png: {tokens}"
    assert "No closing quotation" in said[6]
    assert said[7] == f"image: [plain.png: {tokens}"
    assert said[8] == "image: [nothing changed]"


def interrupt_after(monkeypatch, tokens):
    """Ctrl-C in the middle of every answer."""
    put = TimedStreamer.put

    def interrupted(self, value):
        put(self, value)
        if len(self.times) == tokens:
            raise KeyboardInterrupt

    monkeypatch.setattr(TimedStreamer, "put", interrupted)


def test_ctrl_c_stops_the_answer_and_not_the_chat(capsys, monkeypatch):
    interrupt_after(monkeypatch, 2)
    asked = []
    ask = cli.Session.ask
    monkeypatch.setattr(cli.Session, "ask", lambda self, question: asked.append((self, ask(self, question))))
    out = talk(capsys, monkeypatch, "What is it?", "And now?", arguments=("--keep-tokens", "16"))
    assert out.count("[stopped]") == 2
    assert out.count("16 of 576 visual tokens") == 2
    session, answer = asked[0]
    turns = [text for _, text in session.conversation.messages]
    assert turns[0].endswith("What is it?")
    assert turns[1:] == [answer, "And now?", asked[1][1]]  # what was written is part of the conversation


def test_ctrl_c_before_an_answer_leaves_the_conversation_as_it_was(capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Session, "encode", interrupted)
    out = talk(capsys, monkeypatch, "What is it?", "/clear")
    assert "[stopped]" in out
    assert "[conversation forgotten" in out


def test_ctrl_c_at_the_prompt_ends_the_chat_only_twice_in_a_row(capsys, load):
    lines = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt, "never read"])

    def read(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    options = cli.parse_arguments(["--model-path", V15, "--device", "cpu"])
    session = cli.Session(options, None)
    session.show()
    chat.Chat(session, read).run()
    assert next(lines) == "never read"
    assert capsys.readouterr().out.count("[Ctrl-C once more, Ctrl-D or /quit ends the chat]") == 2


def test_ctrl_c_ends_a_list_of_questions(capsys, monkeypatch):
    interrupt_after(monkeypatch, 2)
    code, out, _ = run(capsys, "--query", "What?", "And?", "--keep-tokens", "16")
    assert code == 130
    assert out.count("[stopped]") == 1


@pytest.mark.parametrize("named", [["--pruner", "divprune"], ["--pruner-args", "tau=0.5"], []])
def test_a_method_without_a_budget_says_that_nothing_is_pruned(capsys, named):
    code, _, err = run(capsys, "--query", "What?", *named)
    assert code == 0
    assert ("without a budget: nothing is pruned" in err) is bool(named)


def test_completion_knows_commands_methods_and_paths(tmp_path):
    (tmp_path / "a b.png").touch()
    (tmp_path / "ab").mkdir()
    assert chat.completions("/pr", "/pr") == ["/pruner "]
    assert chat.completions("/pruner div", "div") == ["divprune "]
    assert chat.completions(f"/image {tmp_path}/a", f"{tmp_path}/a") == [
        shlex.quote(f"{tmp_path}/a b.png"),
        f"{tmp_path}/ab/",
    ]
    assert chat.completions("What", "What") == []


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2J\x1b]0;t\x07", r"\x1b[2J\x1b]0;t\x07"),
        ("a\rb\b\x7f", r"a\rb\x08\x7f"),
        ("\x9b31m", r"\u009b31m"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud83d", r"\ud83d"),
        ("Häuser, 狗, 👨\u200d👩\n\tx", "Häuser, 狗, 👨\u200d👩\n\tx"),
    ],
)
def test_nothing_in_a_text_steers_the_terminal(text, shown):
    assert printable(text) == shown


def test_an_answer_is_printed_harmless(capsys):
    class Tokenizer:
        def decode(self, ids, **options):
            return "".join("a\x1b[31mb "[i] for i in ids)

    streamer = TimedStreamer(Tokenizer(), "</s>")
    streamer.put(torch.tensor([[0]]))  # the prompt
    for i in range(8):
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert capsys.readouterr().out == "a\\x1b[31mb \n"
    assert streamer.written == "a\x1b[31mb "
