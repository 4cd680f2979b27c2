"""The runner: what it asks, where answers go, and that nothing is lost or doubled whatever happens to it."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.benchmarks import BENCHMARKS, load_questions, run_tag
from llava.eval.files import read_json, read_whole_lines
from llava.eval.measure.cost import prefill_flops
from llava.eval.runner import completion, journal, run
from llava.pruning import get_pruner
from own_questions import CHECKPOINT, PICTURES, write_questions
from records import GOLDEN, golden_scorers

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(run.__file__).parents[3])}

RUN = "0123456789abcdef"
COST = {"visual_tokens": 5.0, "average_tokens": 5.0, "newline_tokens": 0, "prefill_flops": 1.0}


@pytest.fixture
def own(tmp_path):
    return write_questions(tmp_path)


def ask(own, answers, *more):
    return run.main([*own, "--answers-file", str(answers), *more])


def texts(path):
    return [(line["question_id"], line["prompt"], line["text"]) for line in read_whole_lines(path)]


def test_answer_lines_and_batches(own, tmp_path):
    assert ask(own, tmp_path / "one.jsonl") == 0
    lines = read_whole_lines(tmp_path / "one.jsonl")
    assert list(lines[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert [line["question_id"] for line in lines] == [i // 2 for i in range(12)]
    assert all(len(line["answer_id"]) == 22 and line["metadata"] == {} for line in lines)
    assert {line["model_id"] for line in lines} == {"llava-v1.5-tiny"}
    summary = read_json(tmp_path / "one.run" / "summary.json")
    assert (summary["questions"], summary["visual_tokens"], summary["skipped"]) == (12, 5.0, 0)
    assert ask(own, tmp_path / "five.jsonl", "--batch-size", "5", "--workers", "3") == 0
    assert texts(tmp_path / "five.jsonl") == texts(tmp_path / "one.jsonl")


def test_methods_inside_the_decoder_tell_their_average(own, tmp_path):
    """Three layers: all 576 tokens enter the first, what is left the others: R, fewer where padding is in the way."""
    inside = ("--pruner", "fastv", "--keep-tokens", "300")
    assert ask(own, tmp_path / "one.jsonl", *inside) == 0
    assert ask(own, tmp_path / "five.jsonl", *inside, "--batch-size", "5") == 0
    assert texts(tmp_path / "five.jsonl") == texts(tmp_path / "one.jsonl")
    summary = read_json(tmp_path / "one.run" / "summary.json")
    left = summary["visual_tokens"]
    assert 0 < left <= 300
    assert summary["average_tokens"] == pytest.approx((576 + 2 * left) / 3)
    config = read_json(GOLDEN / "checkpoints" / "llava-v1.5-tiny" / "config.json")
    shape = config["hidden_size"], config["intermediate_size"]
    assert summary["prefill_flops"] > prefill_flops([summary["average_tokens"]] * 3, *shape)  # it is convex


def test_recycled_tokens_are_among_those_left(own, tmp_path):
    """SparseVLM cuts twice in three layers, and its clusters stand in the prompt like any visual token."""
    whole_picture = ("--pruner", "sparsevlm", "--keep-tokens", "300", "--pruner-args", "exclude_padding=false")
    assert ask(own, tmp_path / "a.jsonl", *whole_picture) == 0
    summary = read_json(tmp_path / "a.run" / "summary.json")
    counts = get_pruner("sparsevlm").counts(576, 300, 3)
    assert counts[-1] > get_pruner("sparsevlm").cuts(576, 300, 3)[-1].keep  # some are recycled
    assert summary["visual_tokens"] == counts[-1]
    assert summary["average_tokens"] == pytest.approx(sum(counts) / 3)


def test_cut_short_and_gone_on_with(own, tmp_path, capsys):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert ask(own, whole) == 0
    assert ask(own, cut, "--on-error", "stop") == 0
    entries = read_whole_lines(cut)
    cut.unlink()  # as if killed: five answers in the journal, the sixth cut off
    book = journal.Journal(tmp_path / "cut.run" / "journal" / "000_0.jsonl", journal.identity_of(tmp_path / "cut.run"))
    book.append(
        [{"position": i, "answer": entries[i], "tokens": COST, "seconds": 0.1, "elapsed": 0.1} for i in range(5)]
    )
    book.close()
    with book.path.open("a") as file:
        file.write('{"position": 5, "answ')
    capsys.readouterr()
    assert ask(own, cut) == 0
    assert "5 of 12 questions are answered" in capsys.readouterr().out
    assert texts(cut) == texts(whole)
    assert not (tmp_path / "cut.run" / "journal").exists()
    changed = cut.stat().st_mtime_ns
    assert ask(own, cut) == 0
    assert "already complete" in capsys.readouterr().out
    assert cut.stat().st_mtime_ns == changed


def test_other_settings_do_not_mix(own, tmp_path, capsys):
    answers = tmp_path / "a.jsonl"
    assert ask(own, answers) == 0
    before = answers.read_bytes()
    assert ask(own, answers, "--keep-tokens", "6") == 2
    assert "keep_tokens" in capsys.readouterr().err
    assert answers.read_bytes() == before
    assert ask(own, answers, "--keep-tokens", "6", "--overwrite") == 0
    assert read_json(tmp_path / "a.run" / "summary.json")["visual_tokens"] == 6.0
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    assert ask(own, tmp_path / "foreign.jsonl") == 2
    assert "not by this runner" in capsys.readouterr().err


def test_second_run_is_refused(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(journal, "LOCK_PATIENCE_SECONDS", 0.2)
    with journal.hold(tmp_path / "a.run" / "lock"):
        assert ask(own, tmp_path / "a.jsonl") == 2
    assert "another run" in capsys.readouterr().err
    with journal.hold(tmp_path / "a.run" / "workers.lock", shared=True):
        assert ask(own, tmp_path / "a.jsonl") == 2


def test_missing_and_broken_pictures(own, tmp_path, capsys):
    (tmp_path / "pictures" / PICTURES[1]).unlink()
    assert ask(own, tmp_path / "a.jsonl") == 2
    error = capsys.readouterr().err
    assert "first question 0" in error
    assert str(tmp_path / "pictures" / PICTURES[1]) in error
    (tmp_path / "pictures" / PICTURES[1]).write_bytes(b"no picture")
    assert ask(own, tmp_path / "a.jsonl") == 2
    assert "question 0" in capsys.readouterr().err
    assert ask(own, tmp_path / "b.jsonl", "--on-error", "skip", "--batch-size", "4") == 0
    assert "4 SKIPPED" in capsys.readouterr().out
    skipped = read_whole_lines(tmp_path / "b.run" / "skipped.jsonl")
    assert [line["position"] for line in skipped] == [1, 4, 7, 10]
    assert len(read_whole_lines(tmp_path / "b.jsonl")) == 8
    assert ask(own, tmp_path / "a.jsonl", "--on-error", "skip", "--batch-size", "1") == 0  # goes on where it stopped
    assert len(read_whole_lines(tmp_path / "a.jsonl")) == 8
    assert ask(own, tmp_path / "a.jsonl") == 0
    assert "it skipped questions" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_killed_and_resumed(own, tmp_path):
    """kill -9 of the launcher, its children die with it; the next runs finish with what an undisturbed run gives."""
    assert ask(own, tmp_path / "calm.jsonl") == 0
    answers = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "llava.eval.run", *own, "--answers-file", str(answers), "--processes", "2"]
    generator = random.Random(4)
    book = tmp_path / "killed.run" / "journal"
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while process.poll() is None and not list(book.glob("*.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
    assert subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, timeout=600).returncode == 0
    assert read_whole_lines(answers)
    assert texts(answers) == texts(tmp_path / "calm.jsonl")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system's signal at a parent's death is Linux's")
def test_no_process_outlives_its_launcher(own, tmp_path):
    """Killed right after it started its processes, while they still load libraries."""
    command = [sys.executable, "-m", "llava.eval.run", *own, "--answers-file", str(tmp_path / "a.jsonl")]
    with subprocess.Popen([*command, "--processes", "2"], env=ENVIRONMENT, stderr=subprocess.DEVNULL) as launcher:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        while len(workers := children.read_text().split()) < 2 and launcher.poll() is None:
            time.sleep(0.01)
        launcher.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (alive := [w for w in workers if _state(w) not in ("gone", "Z")]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2
    assert not alive
    assert not (tmp_path / "a.jsonl").exists()


def _state(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


@pytest.mark.slow
def test_started_by_a_launcher_on_two_machines(own, tmp_path):
    """One process on each of two machines, told its place as accelerate and torchrun do: the same answers."""
    assert ask(own, tmp_path / "one.jsonl") == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "llava.eval.run", *own, "--answers-file", str(tmp_path / "two.jsonl")]
    processes = [
        subprocess.Popen(command, env={**ENVIRONMENT, **place, "MASTER_PORT": str(port), "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(600) for process in processes] == [0, 0]
    assert texts(tmp_path / "two.jsonl") == texts(tmp_path / "one.jsonl")
    assert read_json(tmp_path / "two.run" / "summary.json")["processes"] == 2


def test_turns_go_to_one_process_each(tmp_path):
    script = (
        "import sys; from pathlib import Path; from llava.eval.runner.journal import Turns\n"
        "for turn in Turns(Path(sys.argv[1]), 2001, 4): print(*turn)"
    )
    turns = journal.Turns(tmp_path / "000.next", 2001, 4)
    for _ in range(2):  # a new session counts anew
        turns.reset()
        command = [sys.executable, "-c", script, str(turns.path)]
        processes = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        taken = [[int(place) for place in process.communicate()[0].split()] for process in processes]
        assert all(own == sorted(own) for own in taken)
        assert sorted(taken[0] + taken[1]) == list(range(2001))
    assert list(turns) == []


def test_score_needs_a_benchmark(own, tmp_path, capsys):
    assert ask(own, tmp_path / "a.jsonl", "--score") == 2
    assert "--score needs --benchmark" in capsys.readouterr().err


def test_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    book = journal.Journal(tmp_path / "j.run" / "journal" / "000_0.jsonl", RUN)
    book.append([{"position": 0}])
    write = os.write
    room = [7]

    def write_until_full(file, data):
        if not room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= (written := write(file, data[: room[0]]))
        return written

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.raises(OSError, match="answers so far are kept") as raised:
        book.append([{"position": 1}])
    assert str(book.path) in str(raised.value)
    assert list(journal.read_journals(tmp_path / "j.run", RUN)) == [{"position": 0}]


def test_run_that_is_not_complete_does_not_finish(tmp_path):
    book = journal.Journal(tmp_path / "a.run" / "journal" / "000_0.jsonl", RUN)
    book.append([{"position": 1, "answer": {}, "tokens": None, "seconds": 1.0, "elapsed": 1.0}])
    with pytest.raises(journal.RunRefused, match="first number 0"):
        completion.finish(tmp_path / "a.jsonl", tmp_path / "a.run", RUN, 2, None, {})
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    "questions, chunks, sizes", [(5, 4, [2, 2, 1, 0]), (0, 2, [0, 0]), (6, 2, [3, 3]), (1, 1, [1])]
)
def test_chunks(questions, chunks, sizes):
    slices = completion.chunk_slices(questions, chunks)
    assert [len(range(questions)[piece]) for piece in slices] == sizes


def test_empty_chunk_gets_an_empty_file(tmp_path):
    answers = tmp_path / "vtn_8" / "merge.jsonl"
    folder = journal.run_folder(answers)
    assert folder == tmp_path / "vtn_8.run"
    book = journal.Journal(folder / "journal" / "000_0.jsonl", RUN)
    row = {"tokens": COST, "seconds": 1.0, "elapsed": 1.0}
    book.append([{"position": i, "answer": {"question_id": i}, **row} for i in (2, 0, 4, 1, 3)])
    completion.finish(answers, folder, RUN, 5, 4, {})
    sizes = [len(read_whole_lines(answers.parent / f"4_{i}.jsonl")) for i in range(4)]
    assert sizes == [2, 2, 1, 0]
    assert [line["question_id"] for line in read_whole_lines(answers)] == [0, 1, 2, 3, 4]


# --- places, tags and prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, tag",
    [
        ((128, False), "vtn_128"),
        ((32, True), "vtn_160"),
        ((None, True), "full"),
        ((64, False, "random", (), 3), "vtn_64-random-seed3"),
        ((64, False, "script", ("tau=0.3",)), "vtn_64-script-tau=0.3"),
        ((0.25, True), "vtn_0.25"),
        (("auto:0.95", True), "vtn_auto95"),
        (
            (64, True, "script", ("exclude_padding=false",), 1, [672, 672]),
            "vtn_320-script-exclude_padding=false-grid672x672-seed1",
        ),
        ((None, True, "script", (), 0, (336, 672)), "full-grid336x672"),
        (("auto:gain=0.001:floor=8", False, "scope", (), 2), "vtn_auto-gain0.001-floor8-scope-seed2"),
        (("auto:gain=0.001:floor=8:mean_tokens=64", False), "vtn_auto-mean64"),
    ],
)
def test_tags(arguments, tag):
    assert run_tag(*arguments) == tag


def test_a_fixed_grid_reads_every_picture_in_five_views(own, tmp_path, capsys):
    """The protocol of the paper's LLaVA-NeXT tables: 2,880 tokens whatever the shape, none left out as padding."""
    own[own.index("--model-path") + 1] = str(GOLDEN / "checkpoints" / "llava-v1.6-vicuna-tiny")
    protocol = ("--image-grid", "672x672", "--limit", "3", "--pruner-args", "exclude_padding=false")
    assert ask(own, tmp_path / "a.jsonl", *protocol) == 0
    assert read_json(tmp_path / "a.run" / "summary.json")["visual_tokens"] == 25.0  # five of each of five views
    assert read_json(tmp_path / "a.run" / "config.json")["settings"]["image_grid"] == [672, 672]
    capsys.readouterr()
    assert ask(own, tmp_path / "a.jsonl", "--limit", "3", "--pruner-args", "exclude_padding=false") == 2
    assert "image_grid" in capsys.readouterr().err
    assert ask(own, tmp_path / "b.jsonl", "--image-grid", "600x672") == 2
    assert "whole tiles of 336 x 336" in capsys.readouterr().err


def test_a_grid_is_refused_where_no_tiles_are_cut(own, tmp_path, capsys):
    assert ask(own, tmp_path / "a.jsonl", "--image-grid", "672x672") == 2
    assert "cut pictures into tiles" in capsys.readouterr().err
    assert ask(own, tmp_path / "a.jsonl", "--image-grid", "672") == 2
    assert "WIDTHxHEIGHT" in capsys.readouterr().err
    assert not (tmp_path / "a.run").exists()


def test_places():
    root, file = Path("playground/data/eval"), Path("x/llava_gqa_testdev_balanced.jsonl")
    assert str(BENCHMARKS["gqa"].answers_file(root, file, "llava-v1.5-7b", "vtn_64")) == (
        "playground/data/eval/gqa/answers/llava_gqa_testdev_balanced/llava-v1.5-7b/vtn_64/merge.jsonl"
    )
    assert str(BENCHMARKS["mmvet"].answers_file(root, Path("llava-mm-vet.jsonl"), "c", "vtn_160")) == (
        "playground/data/eval/mm-vet/answers/llava-mm-vet/c/vtn_160.jsonl"
    )


def test_missing_files_are_named_with_their_section(tmp_path, capsys):
    base = ["--model-path", CHECKPOINT, "--data-root", str(tmp_path), "--output-root", str(tmp_path / "out")]
    assert run.main(["--benchmark", "gqa", *base]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "out/gqa/llava_gqa_testdev_balanced.jsonl") in error
    assert "EVAL.md, section 'GQA'" in error
    assert run.main(base) == 2
    assert "--question-file" in capsys.readouterr().err


def test_mmbench_prompts():
    table = next((golden_scorers() / "mmbench/case1").glob("*.tsv"))
    recorded = {line["question_id"]: line for line in read_whole_lines(table.parent / "answers.jsonl")}
    questions = load_questions("mmbench", table, None)
    for question in questions:
        line = recorded.get(question.question_id)
        if line and "None" in line["options"]:  # the recorded prompt is invented; LLaVA stops at such an option
            assert len(question.extra["options"]) == line["options"].index("None")
        elif line:
            assert question.prompt == line["prompt"]
            assert question.extra == {"round_id": 0, "options": line["options"], "option_char": line["option_char"]}
            assert (
                question.text == f"{question.prompt}\nAnswer with the option's letter from the given choices directly."
            )
    chinese = next((golden_scorers() / "mmbench/case2").glob("*.tsv"))
    assert load_questions("mmbench_cn", chinese, None)[0].text.endswith("\n请直接回答选项字母。")


@pytest.mark.parametrize(
    "bench, folder, file",
    [
        ("sqa", "scienceqa", "llava_test_CQM-A.json"),
        ("gqa", "gqa", "llava_gqa_testdev_balanced.jsonl"),
        ("mme", "mme", "llava_mme.jsonl"),
        ("textvqa", "textvqa", "llava_textvqa_val_v051_ocr.jsonl"),
    ],
)
def test_recorded_prompts(bench, folder, file):
    case = golden_scorers() / folder / "case1"
    answers = case / ("answers/merge.jsonl" if bench == "gqa" else "answers.jsonl")
    recorded = {(line["question_id"], line["prompt"]) for line in read_whole_lines(answers)}
    ours = {(question.question_id, question.prompt) for question in load_questions(bench, case / file, case)}
    missing = recorded - ours
    if bench == "textvqa":  # its fixture also has answers to prompts of other forms
        assert len(missing) < len(recorded) / 2
    else:
        assert not missing


def test_prompt_and_query(load):
    from llava.conversation import clean_question
    from llava.eval.benchmarks import Question
    from llava.eval.runner.answering import Answerer

    tokenizer, model, processor, _ = load("llava-v1.5-tiny")
    answerer = Answerer(tokenizer, model, processor, "vicuna_v1", None, 4)
    text = "What is it?\nAnswer the question using a single word or phrase."
    prompt = answerer.prompt(Question(1, text, text, image=Path("x.png")))
    assert prompt.endswith(f"answers to the user's questions. USER: <image>\n{text} ASSISTANT:")
    assert "<image>" not in answerer.prompt(Question(1, text, text))
    assert clean_question(text) == "What is it?"


def test_greyscale_pictures_are_converted(own, tmp_path):
    Image.new("L", (40, 30), 90).save(tmp_path / "pictures" / PICTURES[0])
    assert ask(own, tmp_path / "a.jsonl", "--limit", "1") == 0
