"""Question lists as they come: what is wrong in them is said by name, and nothing outside the pictures is opened."""

import base64
import json

import pytest

from llava.eval.benchmarks import BENCHMARKS, load_questions
from llava.eval.benchmarks.mme import read_truth
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.files import read_json, read_lines, read_table, read_whole_lines
from llava.eval.runner import identity, run
from own_questions import write_questions
from records import GOLDEN

PICTURE = base64.b64encode((GOLDEN / "images" / "small97x61.png").read_bytes()).decode()
HEADER = "index\tquestion\tA\tB\timage\n"


def own_list(folder, **fields):
    line = {"question_id": 1, "image": "a.png", "text": "What?"} | fields
    (folder / "q.jsonl").write_text(json.dumps(line) + "\n")
    return folder / "q.jsonl"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image": ["a.png", "b.png"]}, "question 1 names several pictures"),
        ({"image": 7}, "image must be a text, got int"),
        ({"image": "../secret.png"}, r"the picture '../secret.png' is not inside the image folder"),
        ({"image": "x/../../secret.png"}, "is not inside the image folder"),
        ({"image": "/etc/passwd"}, "the picture '/etc/passwd' is not inside"),
        ({"image": ""}, "is not inside the image folder"),
        ({"image": "a\0.png"}, "is not inside the image folder"),
        ({"text": 5}, "text must be a text, got int: 5"),
        ({"text": None}, "text must be a text, got NoneType"),
        ({"text": "x \ud83d y"}, "half of a character at place 2"),
        ({"question_id": [1]}, "question_id must be a number or a text"),
        ({"question_id": True}, "question_id must be a number or a text"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_questions(None, own_list(tmp_path, **fields), tmp_path / "pictures")


def test_pictures_stay_inside_their_folder(tmp_path):
    folder = tmp_path / "pictures"
    for name in ("a.png", "deep/er/a.png", "deep/../a.png", "..a.png", str(folder / "a.png")):
        [question] = load_questions(None, own_list(tmp_path, image=name), folder)
        assert question.image == folder / name
    entry = {"id": 1, "conversations": [{"value": "Q?"}], "image": "../a.png"}
    (tmp_path / "sqa.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"question 1: the picture '../a.png' is not inside"):
        BENCHMARKS["sqa"].read_questions(tmp_path / "sqa.json", folder)


@pytest.mark.parametrize("content", ['{"id": 1}', '[{"id": 1, "conversations": []}]', '[{"conversations": 3}]', "[7]"])
def test_scienceqas_list_of_another_form_is_named(tmp_path, content):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(ValueError, match=r"q\.json"):
        BENCHMARKS["sqa"].read_questions(tmp_path / "q.json", tmp_path)


def test_texts_are_utf_8_with_or_without_a_mark(tmp_path):
    line = '{"question_id": 1, "text": "Où?"}\n'
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert load_questions(None, tmp_path / "q.jsonl", None)[0].text == "Où?"
    (tmp_path / "q.jsonl").write_bytes(line.replace("Où", "Where").encode() + line.encode("latin-1"))
    with pytest.raises(ValueError, match="1 broken lines, first line 2"):
        load_questions(None, tmp_path / "q.jsonl", None)
    assert read_lines(tmp_path / "q.jsonl")[1] == 1  # converters of answers count such lines
    (tmp_path / "q.json").write_bytes('[\n"Où"]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"q.json, line 2, is not UTF-8"):
        read_json(tmp_path / "q.json")
    (tmp_path / "q.tsv").write_bytes(HEADER.encode() + "1\tOù?\ta\tb\tx\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"q.tsv, line 2, is not UTF-8"):
        load_questions("mmbench", tmp_path / "q.tsv", None)


def write_table(folder, *rows, header=HEADER):
    (folder / "t.tsv").write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return folder / "t.tsv"


def test_a_cell_that_names_a_row_is_that_rows_picture(tmp_path):
    rows = [(1, "q?", "a", "b", PICTURE), (1_000_001, "q?", "b", "a", 1), (2_000_001, "q?", "b", "a", 1_000_001)]
    questions = load_questions("mmbench", write_table(tmp_path, *rows), None)
    assert [question.image_data for question in questions] == [PICTURE] * 3


@pytest.mark.parametrize(
    "cell, reason",
    [
        ("", "row 2 has no picture: its cell in the column image is empty"),
        ("nan", "row 2 has no picture"),
        ("  ", "row 2 has no picture"),
        ("7", "row 2 has no picture: its cell leads to row 7"),
        ("2", "row 2 has no picture: its cell leads to row 2"),
    ],
)
def test_a_row_without_a_picture_is_not_asked_as_if_it_needed_none(tmp_path, cell, reason, capsys):
    table = write_table(tmp_path, (1, "q?", "a", "b", PICTURE), (2, "q?", "a", "b", cell))
    fault = load_questions("mmbench", table, None)[1].fault
    assert fault.startswith(reason)
    checkpoint = str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")
    ask = ["--model-path", checkpoint, "--benchmark", "mmbench", "--question-file", str(table), "--device", "cpu"]
    ask += ["--answers-file", str(tmp_path / "a.jsonl"), "--max-new-tokens", "2"]
    assert run.main(ask) == 2
    assert f"first question 2: {reason}" in capsys.readouterr().err
    assert run.main([*ask, "--on-error", "skip"]) == 0
    [skipped] = read_whole_lines(tmp_path / "a.run" / "skipped.jsonl")
    assert reason in skipped["skipped"]


def test_columns_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match="no column B and no column image; its columns: index, question, A"):
        load_questions("mmbench", write_table(tmp_path, (1, "q?", "a"), header="index\tquestion\tA\n"), None)
    with pytest.raises(ValueError, match="row 2: index must be a whole number, got 'x'"):
        load_questions("mmbench", write_table(tmp_path, (1, "q?", "a", "b", PICTURE), ("x", "q?")), None)
    (tmp_path / "t.tsv").write_bytes(b"\xef\xbb\xbf" + HEADER.encode())
    assert read_table(tmp_path / "t.tsv", ("index",)) == []


@pytest.mark.parametrize("line", ["Is it?\tMaybe", "Is it? Yes", "Is it?\tYes\tNo"])
def test_mmes_truth_names_file_and_line(tmp_path, line):
    (tmp_path / "count").mkdir()
    file = tmp_path / "count" / "a.txt"
    file.write_text(f"Is it a dog?\tYes.\n\n{line}\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3: expected a question, a tab, and Yes or No"):
        read_truth(tmp_path)
    file.write_bytes(b"Is it?\tYes\n\xff\tNo\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2, is not UTF-8"):
        read_truth(tmp_path)


def test_ids_of_two_spellings():
    assert {id_key(name) for name in (7, 7.0, "7", " 7")} == {"7"}
    assert id_key("07") != id_key(7)


def test_the_identity_of_questions_is_what_is_asked(tmp_path):
    def of(folder, **fields):
        folder.mkdir(exist_ok=True)
        pictures = folder / "pictures"
        return identity.questions_identity(load_questions(None, own_list(folder, **fields), pictures), pictures)

    same = of(tmp_path / "a")
    assert of(tmp_path / "b") == same  # wherever it lies
    assert of(tmp_path / "b", category="not asked") == same
    assert (
        len(
            {
                same,
                of(tmp_path / "b", image="b.png"),
                of(tmp_path / "b", text="Who?"),
                of(tmp_path / "b", question_id="1"),
            }
        )
        == 4
    )


@pytest.mark.parametrize("option", [("--limit", "0"), ("--limit", "-1"), ("--max-new-tokens", "0"), ("--limit", "x")])
def test_counts_begin_at_one(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as end:
        run.main([*write_questions(tmp_path, 2), "--answers-file", str(tmp_path / "a.jsonl"), *option])
    assert end.value.code == 2
    assert "expected a whole number from 1" in capsys.readouterr().err


def test_a_list_without_questions_is_refused(tmp_path, capsys):
    given = write_questions(tmp_path, 2)
    (tmp_path / "questions.jsonl").write_text("\n")
    assert run.main([*given, "--answers-file", str(tmp_path / "a.jsonl")]) == 2
    assert "questions.jsonl holds no questions" in capsys.readouterr().err


def test_a_tag_is_no_path(tmp_path, capsys):
    given = [*write_questions(tmp_path, 2), "--answers-file", str(tmp_path / "a.jsonl")]
    assert run.main([*given, "--tag", "../../elsewhere"]) == 2
    assert "--tag is a name, not a path" in capsys.readouterr().err
