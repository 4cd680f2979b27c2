"""Answers that are missing, or named in another way than the questions: matched by meaning, or said and refused."""

import json
import zipfile

import pytest

from llava.eval.benchmarks import BENCHMARKS, pope
from llava.eval.files import read_json, read_whole_lines, write_json
from llava.eval.runner import scoring


def put(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def gqa_question(answer):
    types = {"structural": "query", "semantic": "attr"}
    return {"question": "What?", "answer": answer, "isBalanced": True, "types": types, "semantic": []} | {
        "groups": {"global": None}
    }


@pytest.fixture
def gqa(tmp_path):
    """Four questions, numbered in the list and named by text in the annotations, as JSON has them."""
    write_json(tmp_path / "gqa/data/testdev_balanced_questions.json", {f"{n}": gqa_question("red") for n in range(4)})
    lines = [{"question_id": n, "image": f"{n}.png", "text": "What?"} for n in range(4)]
    put(tmp_path / "gqa" / BENCHMARKS["gqa"].question_file, lines)
    return tmp_path


def score(root, benchmark, answers, *more):
    place = put(root / "a.jsonl", answers)
    given = ["--data-root", str(root), "--output-root", str(root), "--answers-file", str(place), *more]
    return scoring.main([benchmark, *given])


def answers_to(*names, text="red"):
    return [{"question_id": name, "prompt": "What?", "text": text} for name in names]


@pytest.mark.parametrize("spell", [int, str, float])
def test_ids_are_matched_by_meaning(gqa, spell, capsys):
    put(gqa / "gqa" / BENCHMARKS["gqa"].question_file, [{"question_id": str(n), "text": "What?"} for n in range(4)])
    answers = answers_to(*map(spell, range(4)))
    if spell is float:  # no id of a question list, but what some tables make of one
        assert score(gqa, "gqa", answers) == 2
        return
    assert score(gqa, "gqa", answers) == 0
    assert "Accuracy: 100.00%" in capsys.readouterr().out
    assert {one["questionId"] for one in read_json(gqa / "a" / "testdev_balanced_predictions.json")} == set("0123")


def test_half_of_the_answers_is_said_and_refused(gqa, capsys):
    assert score(gqa, "gqa", answers_to(1, 3)) == 2
    assert "2 of 4 questions have no answer, first 0" in capsys.readouterr().err
    assert not (gqa / "a.run").exists()
    assert score(gqa, "gqa", answers_to(1, 3), "--allow-missing") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NOT THE WHOLE BENCHMARK: 2 of 4 questions have no answer, first 0")
    assert "Accuracy: 100.00%" in printed
    assert read_json(gqa / "a.run" / "score.json")["skipped"] == 2


@pytest.mark.parametrize("answers", [[], answers_to(*"wxyz")])
def test_no_answer_to_any_question_is_an_error_whatever_is_asked(gqa, answers, capsys):
    for more in ((), ("--allow-missing",), ("--compat",)):
        assert score(gqa, "gqa", answers, *more) == 2
    assert "a.jsonl" in capsys.readouterr().err


def test_an_empty_list_and_annotations_of_another_list_are_errors(gqa, capsys):
    write_json(gqa / "gqa/data/testdev_balanced_questions.json", {"other": gqa_question("red")})
    assert score(gqa, "gqa", answers_to(*range(4))) == 2
    assert "has none of the questions of" in capsys.readouterr().err
    put(gqa / "gqa" / BENCHMARKS["gqa"].question_file, [])
    assert score(gqa, "gqa", answers_to(*range(4))) == 2
    assert "has no questions to score" in capsys.readouterr().err


def test_textvqa_counts_the_questions_of_an_image(tmp_path, capsys):
    """Two questions about one image share its id: one answer is half of them."""
    texts = [f"{q}?\nReference OCR token: A\nShort." for q in ("what", "who")]
    put(
        tmp_path / "textvqa" / BENCHMARKS["textvqa"].question_file,
        [{"question_id": "a", "image": "a.jpg", "text": text} for text in texts],
    )
    data = [
        {"image_id": "a", "question": f"{q}?", "question_id": n, "answers": ["x"] * 10}
        for n, q in enumerate(("what", "who"))
    ]
    write_json(tmp_path / "textvqa/TextVQA_0.5.1_val.json", {"data": data})
    answers = [{"question_id": "a", "prompt": text, "text": "x"} for text in texts]
    assert score(tmp_path, "textvqa", answers[:1]) == 2
    assert "1 of 2 questions have no answer" in capsys.readouterr().err
    assert score(tmp_path, "textvqa", answers) == 0


def test_vqav2s_upload_holds_answers_named_by_text(tmp_path):
    lines = [{"question_id": n, "image": "a.jpg", "text": "What?"} for n in (11, 12)]
    for name in ("llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"):
        put(tmp_path / "vqav2" / name, lines)
    assert score(tmp_path, "vqav2", answers_to("11", "12", text="Yes")) == 0
    assert read_json(tmp_path / "a.json") == [{"question_id": n, "answer": "yes"} for n in (11, 12)]


def test_scienceqa_of_the_first_questions_counts_only_them(tmp_path):
    problems = {str(n): {"choices": ["a", "b"], "answer": 0} for n in range(4)}
    write_json(tmp_path / "scienceqa/problems.json", problems)
    write_json(tmp_path / "scienceqa/pid_splits.json", {"test": list(problems)})
    asked = [{"id": n, "conversations": [{"value": "<image>\nQ?"}], "image": "a.png"} for n in range(4)]
    write_json(tmp_path / "scienceqa" / BENCHMARKS["sqa"].question_file, asked)
    place = put(tmp_path / "a.jsonl", [{"question_id": str(n), "prompt": "<image>", "text": "A"} for n in range(2)])
    write_json(tmp_path / "a.run/config.json", {"settings": {"limit": 2}, "record": {}})
    result = scoring.score_file("sqa", place, tmp_path, tmp_path)
    assert (result["accuracy"], result["score"], result["total"]) == (100.0, 100.0, 2)


@pytest.mark.parametrize("spelled", ["No", "no.", " NO ", "No."])
def test_popes_labels_in_any_spelling(spelled):
    questions = [{"question_id": 1, "image": "a", "text": "Is it?\n", "category": "random"}]
    labels = {"random": [{"image": "a", "text": "Is it?", "label": spelled}]}
    assert pope.score([{"question_id": "1", "text": "No"}], questions, labels)["accuracy"] == 100.0
    with pytest.raises(ValueError, match="POPE's labels are yes or no, got 'nope' for a"):
        pope.score(
            [{"question_id": 1, "text": "No"}], questions, {"random": [labels["random"][0] | {"label": "nope"}]}
        )


def test_answers_that_are_no_texts_are_named(gqa, capsys):
    assert score(gqa, "gqa", [*answers_to(0), {"question_id": 1, "text": 5}]) == 2
    assert "answer 2: question_id is a number or a text, and text is a text" in capsys.readouterr().err


def test_a_formula_in_an_answer_is_text_in_the_upload(tmp_path):
    table = "index\tquestion\tA\tB\timage\tanswer\tcategory\tl2-category\n1\tq?\ta\tb\t" + "x" * 40 + "\tA\tc\tl\n"
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench" / BENCHMARKS["mmbench"].question_file).write_text(table)
    assert score(tmp_path, "mmbench", answers_to(1, text='=HYPERLINK("http://x","A")')) == 0
    with zipfile.ZipFile(tmp_path / "a.xlsx") as archive:
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    assert ">'=HYPERLINK(" in sheet
    assert "<f>" not in sheet
    assert read_whole_lines(tmp_path / "a.jsonl")[0]["text"].startswith("=")


def test_annotations_of_another_form_are_an_error_and_no_traceback(tmp_path, capsys):
    text = "what?\nShort."
    put(tmp_path / "textvqa" / BENCHMARKS["textvqa"].question_file, [{"question_id": "a", "text": text}])
    write_json(tmp_path / "textvqa/TextVQA_0.5.1_val.json", {"questions": []})
    assert score(tmp_path, "textvqa", [{"question_id": "a", "prompt": text, "text": "x"}]) == 2
    assert "of another form than EVAL.md, section 'TextVQA', says (KeyError: 'data')" in capsys.readouterr().err
