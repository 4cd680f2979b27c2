"""Work that must not be lost or mixed: old journals, damaged lines, cut files, other pictures, killed workers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval.files import read_json, read_whole_lines, write_whole
from llava.eval.lmms_eval.answers import Answer, AnswerBook
from llava.eval.runner import completion, journal, launch, pictures, run
from own_questions import PICTURES, write_questions

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def own(tmp_path):
    return write_questions(tmp_path, 4)


def ask(own, answers, *more):
    return run.main([*own, "--answers-file", str(answers), *more])


def begun(own, answers, monkeypatch):
    """A run that was stopped after its answers were journalled and before they were put together."""
    with monkeypatch.context() as patched:
        patched.setattr(completion, "finish", lambda *_: (_ for _ in ()).throw(OSError("stopped here")))
        assert ask(own, answers) == 2
    [book] = (answers.with_suffix(".run") / "journal").glob("*.jsonl")
    return book


def write_rows(path, run, *positions):
    book = journal.Journal(path, run)
    book.append([{"position": position, "skipped": "é"} for position in positions])
    book.close()


def test_damaged_and_foreign_lines_are_named_and_the_others_kept(tmp_path):
    path = tmp_path / "journal" / "000_0.jsonl"
    write_rows(path, RUN, 0, 1, 2, 3, 4)
    write_rows(path, OTHER, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    flipped = bytearray(lines[1])
    flipped[13] ^= 1  # one bit of the position: still JSON
    assert json.loads(flipped)
    lines[1], lines[2] = bytes(flipped), bytes(len(lines[2]) - 1) + b"\n"
    lines.insert(3, b'{"question_id": 3, "text": "no line of a journal"}\n')
    path.write_bytes(b"".join(lines) + lines[0][:20])  # and a kill in the middle of a line
    found = journal.read_journals(tmp_path, RUN)
    assert [row["position"] for row in found] == [0, 3, 4]
    places = [int(fault.split(", line ")[1].split(",")[0]) for fault in found.faults]
    assert places == [2, 3, 4, 7]
    assert str(path) in found.faults[0]
    assert "another run" in found.faults[-1]
    write_rows(path, RUN, 1)  # goes on behind the whole lines
    assert [row["position"] for row in journal.read_journals(tmp_path, RUN)] == [0, 3, 4, 1]


def test_what_a_damaged_line_answered_is_asked_again(own, tmp_path, monkeypatch, capsys):
    assert ask(own, tmp_path / "calm.jsonl") == 0
    answers = tmp_path / "a.jsonl"
    book = begun(own, answers, monkeypatch)
    lines = book.read_bytes().splitlines(keepends=True)
    book.write_bytes(lines[0] + lines[1].replace(b'"text": "', b'"text": "x') + b"".join(lines[2:]))
    capsys.readouterr()
    assert ask(own, answers) == 0
    printed = capsys.readouterr()
    assert f"{book}, line 2, is damaged" in printed.err
    assert "going on: 3 of 4 questions are answered" in printed.out
    told = [[line["text"] for line in read_whole_lines(tmp_path / f"{name}.jsonl")] for name in ("calm", "a")]
    assert told[0] == told[1]


def test_overwriting_that_is_killed_leaves_nothing_to_adopt(own, tmp_path, monkeypatch, capsys):
    answers = tmp_path / "a.jsonl"
    folder = answers.with_suffix(".run")
    book = begun(own, answers, monkeypatch)
    removed = []
    for name, module in (("unlink", Path), ("replace", os)):
        plain = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *given, plain=plain, **more: (removed.append(Path(given[0]).name), plain(*given, **more)),
        )
    completion.discard(answers, folder)
    assert removed[0] == "journal"
    assert removed[-1] == "config.json"
    monkeypatch.undo()
    book = begun(own, answers, monkeypatch)
    (folder / "config.json").unlink()  # however it came about: settings gone, journal there
    capsys.readouterr()
    assert ask(own, answers, "--max-new-tokens", "3") == 0
    assert f"{book}, line 1, is of another run" in capsys.readouterr().err
    assert read_json(folder / "config.json")["settings"]["max_new_tokens"] == 3
    fresh = tmp_path / "fresh.jsonl"
    assert ask(own, fresh, "--max-new-tokens", "3") == 0
    assert [line["text"] for line in read_whole_lines(answers)] == [line["text"] for line in read_whole_lines(fresh)]


def test_runs_of_an_older_version_are_refused_with_a_sentence(own, tmp_path, monkeypatch, capsys):
    answers = tmp_path / "a.jsonl"
    begun(own, answers, monkeypatch)
    config = answers.with_suffix(".run") / "config.json"
    older = read_json(config)
    del older["run"]
    config.write_text(json.dumps(older))
    assert ask(own, answers) == 2
    assert "older version without checksums: --overwrite" in capsys.readouterr().err
    assert ask(own, answers, "--overwrite") == 0
    folder = tmp_path / "harness.run"
    folder.mkdir()
    (folder / "settings.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match="older version, without checksums"):
        AnswerBook(folder, {"seed": 0})


def test_a_finished_file_that_was_cut_is_not_complete(own, tmp_path, capsys):
    answers = tmp_path / "a.jsonl"
    assert ask(own, answers) == 0
    whole = answers.read_bytes()
    for changed in (whole[: len(whole) // 2], b"", whole.replace(b'"text": "', b'"text": "x', 1)):
        answers.write_bytes(changed)
        capsys.readouterr()
        assert ask(own, answers) == 2
        assert f"{answers} is not what the run wrote" in capsys.readouterr().err
    answers.write_bytes(whole)
    assert ask(own, answers) == 0


def test_a_picture_that_was_replaced_is_noticed(own, tmp_path, monkeypatch, capsys):
    shown, other = (tmp_path / "pictures" / name for name in PICTURES[:2])
    before = shown.read_bytes()
    for answers, finished in ((tmp_path / "a.jsonl", True), (tmp_path / "b.jsonl", False)):
        if finished:
            assert ask(own, answers) == 0
        else:
            begun(own, answers, monkeypatch)
        shown.write_bytes(other.read_bytes())
        capsys.readouterr()
        assert ask(own, answers) == 2
        assert f"first {shown}" in capsys.readouterr().err
        shown.write_bytes(before)  # the same picture, at another time
        assert ask(own, answers) == 0


def test_pictures_are_read_only_where_their_file_changed(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    stamps = [pictures.stamp(file)]
    monkeypatch.setattr(pictures, "_digest", lambda path: pytest.fail("read"))
    assert pictures.changed(stamps) == []
    file.unlink()
    assert pictures.changed(stamps) == []  # a missing one is another matter


def test_answers_are_not_written_over_what_is_read(own, tmp_path, capsys):
    questions = (tmp_path / "questions.jsonl").read_bytes()
    (tmp_path / "link.jsonl").symlink_to("questions.jsonl")
    for place in ("questions.jsonl", "link.jsonl", f"pictures/../pictures/{PICTURES[1]}"):
        assert ask(own, tmp_path / place, "--overwrite") == 2
    assert "same file" in capsys.readouterr().err
    assert (tmp_path / "questions.jsonl").read_bytes() == questions
    assert ask(own, tmp_path / "pictures") == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_worker_that_is_killed_is_named(tmp_path, capfd):
    (tmp_path / "ends_itself.py").write_text(
        "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n"
    )
    program = (
        "import sys; from llava.eval.runner.launch import run_processes; sys.exit(run_processes('ends_itself', [], 2))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(launch.__file__).parents[3])])
    result = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, timeout=100)
    assert result.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by signal 9 (SIGKILL)" in capfd.readouterr().err


def test_lmms_evals_answers_are_checked_as_well(tmp_path, capsys):
    answer = Answer("yes", {"visual_tokens": 4.0}, 30, 2, 0.5)
    AnswerBook(tmp_path, {}).append([(name, "t", number, answer) for number, name in enumerate("abc")])
    file = tmp_path / "answers_0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1].replace(b"yes", b"no ") + lines[2])
    again = AnswerBook(tmp_path, {})
    assert set(again.answers) == {"a", "c"}
    assert f"{file}, line 2, is damaged" in capsys.readouterr().err


def test_names_that_are_no_utf_8_are_kept(tmp_path):
    path = tmp_path / "journal" / "000_0.jsonl"
    book = journal.Journal(path, RUN)
    row = {"position": 0, "skipped": "no file at \udcff.png", "elapsed": 1.0}
    book.append([row])
    book.close()
    assert list(journal.read_journals(tmp_path, RUN)) == [row]
    completion.finish(tmp_path / "a.jsonl", tmp_path, RUN, 1, None, {})
    assert read_whole_lines(tmp_path / "skipped.jsonl") == [row]


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    with pytest.raises(OSError, match="/dev/full"):
        write_whole(Path("/dev/full"), "x")
    assert Path("/dev/full").is_char_device()
    write_whole(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_whole(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "x"
