"""The scoring command on recorded answers: results, upload files, what is said of skipped questions."""

import http.server
import json
import shutil
import threading

import pytest

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.files import read_json, read_whole_lines, write_json
from llava.eval.runner import scoring as score
from llava.eval.runner.completion import merge_chunks
from records import golden_scorers

SCORERS = golden_scorers()


def lay_out(tmp_path, bench, fixture, answers="answers.jsonl", case="case1"):
    """Put a fixture where a benchmark's files belong, its answers where a run leaves them."""
    benchmark = BENCHMARKS[bench]
    root = tmp_path / "data"
    shutil.copytree(SCORERS / fixture / case, root / benchmark.folder)
    place = benchmark.answers_file(root, root / benchmark.question_file, "invented-model", "vtn_64")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(SCORERS / fixture / case / answers, place)
    return root, place


def answer_the_rest(bench, root, answers):
    """Empty answers to the questions that a fixture leaves unanswered, which is refused."""
    questions = BENCHMARKS[bench].read_questions(
        root / BENCHMARKS[bench].folder / BENCHMARKS[bench].question_file, None
    )
    answered = {line["question_id"] for line in read_whole_lines(answers)}
    with answers.open("a") as file:
        for question in questions:
            if question.question_id not in answered:
                line = {"question_id": question.question_id, "prompt": question.prompt, "text": ""}
                file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize(
    "bench, fixture, key",
    [("textvqa", "textvqa", "accuracy"), ("pope", "pope", "average_f1"), ("mme", "mme", "perception")],
)
def test_scores_and_keeps_them(bench, fixture, key, tmp_path, capsys):
    root, answers = lay_out(tmp_path, bench, fixture)
    arguments = [bench, "--answers-file", str(answers), "--data-root", str(root), "--output-root", str(root)]
    assert score.main(arguments) == 0
    expected = read_json(SCORERS / fixture / "case1" / "expected.json")[key]
    kept = read_json(answers.with_name("vtn_64.run") / "score.json")
    assert kept["score"] == pytest.approx(100 * expected if bench == "pope" else expected)
    assert (kept["benchmark"], kept["skipped"]) == (bench, 0)
    if bench == "mme":
        for file in (SCORERS / "mme/case1/expected_txt").iterdir():
            ours = root / "MME/eval_tool/answers/llava_mme/invented-model/vtn_64" / file.name
            assert ours.read_text() == file.read_text()
    capsys.readouterr()


def test_gqa_layout_and_predictions(tmp_path, capsys):
    root, answers = lay_out(tmp_path, "gqa", "gqa", "answers/merge.jsonl")
    questions = root / "gqa" / "data" / "testdev_balanced_questions.json"
    questions.parent.mkdir()
    shutil.move(root / "gqa" / "testdev_balanced_questions.json", questions)
    assert score.score_file("gqa", answers, root, root)["score"] == 37.5
    assert "Accuracy: 37.50%" in capsys.readouterr().out
    predictions = read_json(answers.parent / "testdev_balanced_predictions.json")
    assert predictions == read_json(SCORERS / "gqa/case1/expected_predictions.json")


def test_vqav2_upload_and_val(tmp_path, capsys):
    merged = "answers/llava_vqav2_val/invented-model/vtn_64/merge.jsonl"
    root, answers = lay_out(tmp_path, "vqav2", "vqav2", merged)
    questions = root / "vqav2" / "llava_vqav2_val.jsonl"
    expected = read_json(SCORERS / "vqav2/case1/expected.json")
    result = score.score_file("vqav2", answers, root, root, questions)
    assert expected["converter_stdout"] in capsys.readouterr().out
    upload = next((root / "vqav2" / "answers_upload").rglob("vtn_64.json"))
    assert read_json(upload) == read_json(SCORERS / "vqav2/case1/expected_upload.json")
    assert result["score"] == pytest.approx(expected["official_on_upload"]["overall"])
    answered = {line["question_id"] for line in read_whole_lines(questions)}
    items = [item["official"] for item in expected["items"] if item["question_id"] in answered]
    (root / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    result = score.score_file("vqav2", answers, root, root, questions)  # the upload is then of the list asked
    assert result["score"] == pytest.approx(sum(items) / len(items))
    test_list = questions.rename(root / "llava_vqav2_mscoco_test-dev2015.jsonl")
    with pytest.raises(FileNotFoundError, match=r"vqav2/llava_vqav2_mscoco_test2015.jsonl; EVAL.md, section 'VQAv2'"):
        score.score_file("vqav2", answers, root, root, test_list)


def test_chunks_are_merged_in_their_order_and_none_may_miss(tmp_path, capsys):
    for fixture, chunks in (("gqa/case1/answers", 4), ("gqa/case2/answers", 5)):
        folder = shutil.copytree(SCORERS / fixture, tmp_path / str(chunks))
        merged = (folder / "merge.jsonl").read_bytes()
        (folder / "merge.jsonl").write_text("old\n")
        assert merge_chunks(folder).read_bytes() == merged
    for i in range(5):
        (folder / f"5_{i}.jsonl").rename(folder / f"11_{i}.jsonl")
    for i in range(5, 11):
        (folder / f"11_{i}.jsonl").write_text(f'{{"i": {i}}}')  # no line end, and 10 comes after 9
    assert merge_chunks(folder).read_text().endswith('{"i": 9}\n{"i": 10}\n')
    (folder / "11_7.jsonl").unlink()
    assert score.main(["gqa", "--answers-file", str(folder)]) == 2
    assert f"{folder}/11_7.jsonl missing" in capsys.readouterr().err
    (folder / "2_0.jsonl").write_text("")
    with pytest.raises(ValueError, match="of one n"):
        merge_chunks(folder)


def test_vizwiz_upload_and_val(tmp_path, capsys):
    root, answers = lay_out(tmp_path, "vizwiz", "vizwiz")
    expected = read_json(SCORERS / "vizwiz/case1/expected.json")
    questions = root / "vizwiz" / "llava_val.jsonl"
    result = score.score_file("vizwiz", answers, root, root, questions)
    printed = capsys.readouterr().out
    assert expected["converter_stdout"] in printed
    assert "unanswerable: 75.00%" in printed
    assert result["score"] == pytest.approx(100 * expected["accuracy"])
    with answers.open("a") as file:
        file.write('\n{"question_id": 1, "te\n')
    score.score_file("vizwiz", answers, root, root, questions)
    assert "error_line: 2" in capsys.readouterr().out


def test_gqa_list_that_lacks_questions_is_said_first(tmp_path, capsys):
    root, answers = lay_out(tmp_path, "gqa", "gqa", "answers/merge.jsonl")
    (root / "gqa" / "data").mkdir()
    shutil.move(root / "gqa" / "testdev_balanced_questions.json", root / "gqa" / "data")
    lines = (root / "gqa" / "llava_gqa_testdev_balanced.jsonl").read_text().splitlines()
    (root / "part.jsonl").write_text("\n".join(lines[:10]) + "\n")
    score.score_file("gqa", answers, root, root, root / "part.jsonl")
    assert capsys.readouterr().out.startswith("NOT THE WHOLE BENCHMARK: the question list has 10 of the 48 balanced")


def test_answers_of_another_form_are_refused(tmp_path, capsys):
    root, answers = lay_out(tmp_path, "mmvet", "mmvet")
    answers.write_text('{"id": 1}\n')
    assert score.main(["mmvet", "--answers-file", str(answers), "--data-root", str(root)]) == 2
    assert "answer 1, lacks question_id and text" in capsys.readouterr().err


def test_mmbench_and_scienceqa_files(tmp_path):
    root, answers = lay_out(tmp_path, "mmbench_cn", "mmbench", case="case2")
    answer_the_rest("mmbench_cn", root, answers)
    result = score.score_file("mmbench_cn", answers, root, root)
    assert result["score"] == pytest.approx(54.54545454545454)
    assert list((root / "mmbench_cn" / "answers_upload").rglob("vtn_64.xlsx"))
    root, answers = lay_out(tmp_path / "sqa", "sqa", "scienceqa")
    answer_the_rest("sqa", root, answers)
    score.score_file("sqa", answers, root, root)
    assert read_json(answers.with_name("vtn_64_result.json"))["acc"] == pytest.approx(15.789473684210526)
    assert set(read_json(answers.with_name("vtn_64_output.jsonl"))) == {"correct", "incorrect"}


def test_skipped_questions_are_said_first_and_left_out(tmp_path, capsys):
    root, answers = lay_out(tmp_path, "pope", "pope")
    lines = read_whole_lines(answers)
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    folder = answers.with_name("vtn_64.run")
    folder.mkdir()
    skipped = {"position": 0, "question_id": lines[0]["question_id"], "skipped": "no picture"}
    (folder / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    result = score.score_file("pope", answers, root, root)
    assert capsys.readouterr().out.startswith("NOT THE WHOLE BENCHMARK: 1 questions were skipped, first 1")
    assert result["categories"]["adversarial"]["samples"] == 25


def test_missing_annotations_are_named(tmp_path, capsys):
    root, answers = lay_out(tmp_path, "textvqa", "textvqa")
    (root / "textvqa" / "TextVQA_0.5.1_val.json").unlink()
    arguments = ["--answers-file", str(answers), "--data-root", str(root), "--output-root", str(root)]
    assert score.main(["textvqa", *arguments]) == 2
    error = capsys.readouterr().err
    assert str(root / "textvqa" / "TextVQA_0.5.1_val.json") in error
    assert "EVAL.md, section 'TextVQA'" in error


class Judge(http.server.BaseHTTPRequestHandler):
    asked: list = []  # noqa: RUF012 (one server, one test)

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        reply = json.dumps({"choices": [{"message": {"content": "0.5"}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def test_mmvet_asks_a_judge_only_when_told(tmp_path):
    root, answers = lay_out(tmp_path, "mmvet", "mmvet")
    answer_the_rest("mmvet", root, answers)
    write_json(root / "mm-vet" / "mm-vet.json", {"v1_0": {"question": "?", "answer": "x", "capability": ["ocr"]}})
    server = http.server.HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arguments = ["mmvet", "--answers-file", str(answers), "--data-root", str(root), "--output-root", str(root)]
    assert score.main(arguments) == 0
    assert not Judge.asked
    assert score.main([*arguments, "--judge-url", f"http://127.0.0.1:{server.server_port}/v1"]) == 0
    server.shutdown()
    assert len(Judge.asked) == 1
    assert read_json(answers.with_name("vtn_64.run") / "score.json")["score"] == 50.0
