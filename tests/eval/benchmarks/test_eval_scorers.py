"""Every scorer against recorded scores of the reference scorers (tests/golden/scorers)."""

import re
import zipfile
from xml.etree import ElementTree

import pytest

from llava.eval.benchmarks import (
    ai2d,
    chartqa,
    gqa,
    hallusionbench,
    longvideobench,
    mlvu,
    mmbench,
    mme,
    mmvet,
    mvbench,
    ocrbench,
    pope,
    sqa,
    textvqa,
    videomme,
    vizwiz,
    vqav2,
)
from llava.eval.benchmarks.shared.letters import general_letter, letter_by_rules, mvbench_letter
from llava.eval.benchmarks.shared.options import named_options, shown_options
from llava.eval.benchmarks.shared.spreadsheet import spreadsheet
from llava.eval.benchmarks.shared.vqa_text import normalise, normalise_vqa, soft_score, vqa_score_older
from llava.eval.files import read_json, read_lines, read_table, read_whole_lines
from records import golden_scorers

SCORERS = golden_scorers()
CASES = ("case1", "case2")
exactly = lambda value: pytest.approx(value, abs=1e-9, rel=1e-12)  # noqa: E731


def folder(bench, case):
    return SCORERS / bench / case, read_json(SCORERS / bench / case / "expected.json")


# --- normalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["case1/normalize_expected.jsonl", "case2/normalize_expected.jsonl", "contractions.jsonl"]
)
def test_normalisers(file):
    for row in read_whole_lines(SCORERS / "textvqa" / file):
        assert normalise(row["raw"]) == row["evalai"], row
        assert normalise_vqa(row["raw"].replace("\n", " ").replace("\t", " ").strip()) == row["vqa_official"], row


def test_only_the_first_32_periods_go():
    assert normalise("x." * 40) == "x" * 32 + "x." * 8
    assert normalise("1,000 - 3.") == "1000 3"
    assert normalise("n/a") == "n"
    assert normalise("John's") == "john 's"


@pytest.mark.parametrize("equal, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_score(equal, expected):
    assert soft_score("a", ["a"] * equal + ["b"] * (10 - equal)) == exactly(expected)


# --- the VQA family ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_textvqa(case):
    path, expected = folder("textvqa", case)
    answers = read_whole_lines(path / "answers.jsonl")
    data = read_json(path / "TextVQA_0.5.1_val.json")["data"]
    result = textvqa.score(answers, data)
    assert result["samples"] == expected["samples"]
    assert result["score"] == exactly(expected["accuracy"])
    assert f"{result['score']:.2f}" == expected["accuracy_printed"]
    for line, item in zip(result["lines"], expected["items"], strict=True):
        assert {k: line[k] for k in ("question_id", "image_id", "normalized")} == {
            k: item[k] for k in ("question_id", "image_id", "normalized")
        }
        assert line["score"] == exactly(item["score"])


def test_textvqa_refuses_unknown_prompts():
    with pytest.raises(ValueError, match="no TextVQA answers"):
        textvqa.score([], [])
    with pytest.raises(ValueError, match="cannot tell the question"):
        textvqa.question_of("one line")


@pytest.mark.parametrize("case", CASES)
def test_vqav2(case):
    path, expected = folder("vqav2", case)
    answers, broken = read_lines(path / "answers/llava_vqav2_val/invented-model/vtn_64/merge.jsonl")
    questions = read_whole_lines(path / "llava_vqav2_mscoco_test2015.jsonl")
    results = len({answer["question_id"] for answer in answers})
    printed = f"total results: {results}, total split: {len(questions)}, error_line: {broken}"
    assert printed == expected["converter_stdout"]
    entries = vqav2.upload(answers, questions)
    assert entries == read_json(path / "expected_upload.json")
    annotations = read_json(path / "v2_mscoco_val2014_annotations.json")["annotations"]
    last = {a["question_id"]: a["text"] for a in answers}
    raw = [{"question_id": q["question_id"], "answer": last.get(q["question_id"], "")} for q in questions]
    runs = {
        "official_on_upload": vqav2.score(entries, annotations),
        "official_on_raw_text": vqav2.score(raw, annotations),
        "older_port_on_upload": vqav2.score(entries, annotations, vqa_score_older),
    }
    for name, result in runs.items():
        assert result["score"] == exactly(expected[name]["overall"]), name
        assert result["per_answer_type"] == exactly(expected[name]["perAnswerType"])
        assert result["per_question_type"] == exactly(expected[name]["perQuestionType"])
    for item, entry in zip(expected["items"], entries, strict=True):
        name = item["question_id"]
        assert (entry["question_id"], entry["answer"]) == (name, item["upload"])
        assert 100 * runs["official_on_upload"]["items"][name] == exactly(item["official"])
        assert 100 * runs["official_on_raw_text"]["items"][name] == exactly(item["official_on_raw_text"])
        assert 100 * runs["older_port_on_upload"]["items"][name] == exactly(item["older_port"])


@pytest.mark.parametrize("case", CASES)
def test_vizwiz(case):
    path, expected = folder("vizwiz", case)
    questions = read_whole_lines(path / "llava_val.jsonl")
    answers = read_whole_lines(path / "answers.jsonl")
    entries = vizwiz.upload(answers, questions)
    assert entries == read_json(path / "expected_upload.json")
    result = vizwiz.score(entries, read_json(path / "val.json"))
    assert result["score"] == exactly(100 * expected["accuracy"])
    assert result["per_answer_type"] == exactly({k: 100 * v for k, v in expected["per_answer_type"].items()})
    kind_of = {entry["image"]: entry["answer_type"] for entry in read_json(path / "val.json")}
    for item, entry in zip(expected["items"], entries, strict=True):
        assert entry == {"image": item["image"], "answer": item["normalized"]}
        assert kind_of[item["image"]] == item["answer_type"]
        assert result["items"][item["image"]] == exactly(item["score"])
    with pytest.raises(ValueError, match="have no answer"):
        vizwiz.upload(answers[:5], questions)


# --- exact answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_gqa(case):
    path, expected = folder("gqa", case)
    answers = read_whole_lines(path / "answers/merge.jsonl")
    predicted = gqa.predictions(answers)
    assert predicted == read_json(path / "expected_predictions.json")
    questions = read_json(path / "testdev_balanced_questions.json")
    result = gqa.score(predicted, questions)
    summary = expected["official"]["summary"]
    assert result["score"] == exactly(expected["accuracy"])
    assert [round(result[k], 2) for k in ("binary", "open", "score", "distribution")] == [
        summary[k] for k in ("Binary", "Open", "Accuracy", "Distribution")
    ]
    assert {f"Accuracy / {name}" for name in result["breakdowns"]} | {"summary"} == set(expected["official"])
    for name, parts in result["breakdowns"].items():
        assert {key: [round(value, 2), count] for key, (value, count) in parts.items()} == (
            expected["official"][f"Accuracy / {name}"]
        )
    assert re.search(rf"Accuracy: {expected['accuracy']:.2f}%", gqa.report(result))
    text = {a["question_id"]: a["text"] for a in answers}
    matches, given = [], {entry["questionId"]: entry["prediction"] for entry in predicted}
    assert f"Validity: {summary['Validity']:.2f}%\nPlausibility: {summary['Plausibility']:.2f}%" in gqa.report(result)
    for item in expected["items"]:
        assert given[item["questionId"]] == item["prediction"]
        assert result["items"][item["questionId"]] == item["official"]
        matches.append(gqa.harness_match(text[item["questionId"]], questions[item["questionId"]]["answer"]))
        assert matches[-1] == item["harness"], item
    assert sum(matches) / len(matches) == exactly(expected["harness_exact_match"])
    with pytest.raises(ValueError, match="no prediction"):
        gqa.score(predicted[1:], questions)


@pytest.mark.parametrize("case", CASES)
def test_scienceqa(case):
    path, expected = folder("scienceqa", case)
    answers = read_whole_lines(path / "answers.jsonl")
    problems, split = read_json(path / "problems.json"), read_json(path / "pid_splits.json")["test"]
    result = sqa.score(answers, problems, split)
    assert (result["total"], result["correct"]) == (expected["total"], expected["correct"])
    assert f"{result['accuracy']:.2f}" == expected["accuracy_printed"]
    assert f"{result['score']:.2f}" == expected["img_accuracy_printed"]
    assert result["result"]["acc"] == exactly(expected["acc"])
    assert result["result"]["count"] == expected["count"]
    for name, item in expected["items"].items():
        ours = result["parsed"][name]
        assert {
            "parsed": ours["parsed"],
            "multimodal": ours["multimodal"],
            "correct": ours["correct"],
            "pred_idx": ours["index"],
        } == item
    assert len(result["output"]["correct"]) + len(result["output"]["incorrect"]) == expected["total"]
    assert set(result["parsed"]) == set(expected["items"])


@pytest.mark.parametrize("case", CASES)
def test_pope(case):
    path, expected = folder("pope", case)
    answers, questions = read_whole_lines(path / "answers.jsonl"), read_whole_lines(path / "llava_pope_test.jsonl")
    labels = {name: read_whole_lines(path / f"coco/coco_pope_{name}.json") for name in pope.CATEGORIES}
    result = pope.score(answers, questions, labels, compat=True)
    assert result["average_f1"] == exactly(expected["average_f1"])
    for name, part in expected["llava"].items():
        assert result["categories"][name] == exactly(part), name
    category = {q["question_id"]: q["category"] for q in questions}
    everything = []
    for name in pope.CATEGORIES:
        own = [a["text"] for a in answers if category[a["question_id"]] == name]
        pairs = list(zip(own, [entry["label"] for entry in labels[name]], strict=False))
        everything += pairs
        if name in expected["harness"]:
            assert pope.harness_measures(pairs) == exactly(expected["harness"][name])
    if case == "case1":
        assert pope.harness_measures(everything) == exactly(expected["harness"]["all"])
        assert pope.score(answers[::-1], questions, labels)["average_f1"] == exactly(expected["average_f1"])
    else:  # an answer twice, three missing
        with pytest.raises(ValueError, match=r"answered twice|no answer"):
            pope.score(answers, questions, labels)


@pytest.mark.parametrize("case", CASES)
def test_mme(case):
    path, expected = folder("mme", case)
    answers = read_whole_lines(path / "answers.jsonl")
    truth = mme.read_truth(path / "MME_Benchmark_release_version")
    converted = mme.rows(answers, truth)
    files = {file.name: file.read_text(encoding="utf-8") for file in (path / "expected_txt").iterdir()}
    assert mme.upload(converted) == files
    assert mme.upload(converted, compat=True) == files
    for result in (mme.score(converted), mme.score(converted, compat=True)):
        assert result["perception"] == exactly(expected["perception"])
        assert result["cognition"] == exactly(expected["cognition"])
        for name, group in expected["calculation"].items():
            assert result[name.lower()] == exactly(group["total"])
            for task, points in group["tasks"].items():
                assert result["tasks"][task]["points"] == exactly(points)
        for task, detail in expected["detail"].items():
            assert result["tasks"][task]["labels"] == detail.pop("labels")
            assert {key: result["tasks"][task][key] for key in detail} == exactly(detail), task
            detail["labels"] = result["tasks"][task]["labels"]
    harness = mme.score(converted, read=mme.harness_label)
    assert harness["perception"] == exactly(expected["harness"]["mme_perception_score"])
    assert harness["cognition"] == exactly(expected["harness"]["mme_cognition_score"])


def test_mme_matches_by_name_and_refuses_broken_lines():
    path, expected = folder("mme", "case1")
    answers = read_whole_lines(path / "answers.jsonl")
    truth = mme.read_truth(path / "MME_Benchmark_release_version")
    shuffled = mme.rows(answers[::2] + answers[1::2], truth)
    assert mme.score(shuffled)["perception"] == exactly(expected["perception"])
    assert mme.score(shuffled, compat=True)["perception"] != exactly(expected["perception"])
    answers[0] = answers[0] | {"text": "Yes\nor\tno"}
    broken = mme.rows(answers, truth)
    assert all(line.count("\t") == 3 for text in mme.upload(broken).values() for line in text.splitlines())
    with pytest.raises(ValueError, match="line break"):
        mme.score(broken, compat=True)


def cells(data):
    """Rows of the first sheet of an .xlsx file, as {column: value}."""
    name = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(data) as archive:
        shared = []
        if "xl/sharedStrings.xml" in archive.namelist():
            root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
            shared = ["".join(t.text or "" for t in item.iter(f"{name}t")) for item in root]
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = []
    for row in sheet.iter(f"{name}row"):
        values = {}
        for cell in row:
            column = re.match("[A-Z]+", cell.get("r"))[0]
            value = cell.find(f"{name}v")
            if cell.get("t") == "s":
                values[column] = shared[int(value.text)]
            elif cell.get("t") == "inlineStr":
                values[column] = "".join(t.text or "" for t in cell.iter(f"{name}t"))
            elif value is not None:
                values[column] = int(float(value.text))
        rows.append({column: value for column, value in values.items() if value != ""})
    return rows


@pytest.mark.parametrize("case", CASES)
def test_mmbench(case, tmp_path):
    path, expected = folder("mmbench", case)
    table = read_table(next(path.glob("*.tsv")))
    answers = read_whole_lines(path / "answers.jsonl")
    header, rows = mmbench.upload(answers, table)
    assert header == expected["upload_columns"]
    (tmp_path / "upload.xlsx").write_bytes(spreadsheet(header, rows))
    assert cells(tmp_path / "upload.xlsx") == cells(path / "expected_upload.xlsx")
    result = mmbench.score(answers, table)
    assert len(table) == expected["rows_in_tsv"]
    assert result["base_questions"] == expected["base_questions"]
    assert result["missing"] == expected["missing"]
    assert result["score"] == exactly(expected["circular_static"]["overall"])
    assert result["category"] == exactly(expected["circular_static"]["category"])
    assert result["l2"] == exactly(expected["circular_static"]["l2"])
    assert result["single_pass"] == exactly(expected["single_pass_static"])
    assert result["exact_letter_single_pass"] == exactly(expected["exact_letter_single_pass"])
    by_index = {int(row["index"]): row for row in table}
    for item in expected["items"]:
        assert by_index[item["index"]]["answer"] == item["answer"]
        rules = letter_by_rules(item["prediction"], named_options(by_index[item["index"]]))
        assert rules == item["rule_extracted"], item


@pytest.mark.parametrize("case", CASES)
def test_mmvet(case):
    path = SCORERS / "mmvet" / case
    submission = mmvet.upload(read_whole_lines(path / "answers.jsonl"))
    assert submission == read_json(path / "expected_results.json")
    references = {
        "v1_0": {"question": "?", "answer": "x", "capability": ["rec", "ocr"]},
        "v1_999": {"question": "?", "answer": "y", "capability": ["ocr"]},
    }
    result = mmvet.score(submission, references, lambda *_: 0.5)
    assert result["score"] == 25.0
    assert result["per_capability"] == {"rec": 50.0, "ocr": 25.0}
    with pytest.raises(ValueError, match="from 0 to 1"):
        mmvet.read_grade("10")


# --- video and further image benchmarks ----------------------------------------------------------------------------


def samples(bench, case):
    path, expected = folder(bench, case)
    return read_whole_lines(path / "samples.jsonl"), expected


@pytest.mark.parametrize("case", CASES)
def test_multiple_choice(case):
    rows, expected = samples("mlvu", case)
    result = mlvu.score(rows)
    assert result["extracted"] == [item["extracted"] for item in expected["items"]]
    assert result["score"] == exactly(expected["m_avg_dev"])
    assert result["per_type"] == exactly(expected["per_type"])

    rows, expected = samples("videomme", case)
    result = videomme.score(rows)
    assert result["extracted"] == [item["extracted"] for item in expected["items"]]
    assert result["items"] == [item["correct"] for item in expected["items"]]
    assert result["score"] == exactly(expected["overall"])
    assert result["per_duration"] == exactly({name: expected[name] for name in ("short", "medium", "long")})

    rows, expected = samples("mvbench", case)
    result = mvbench.score(rows)
    assert result["targets"] == [item["gt"] for item in expected["items"]]
    assert result["items"] == [item["score"] for item in expected["items"]]
    assert result["per_task"] == exactly(expected["per_task"])
    assert result["score"] == exactly(expected["mean_over_tasks"])
    older = expected["harness_0_5"]  # the same in both releases
    assert (result["items"], result["score"]) == (older["scores"], exactly(older["mean_over_tasks"]))

    rows, expected = samples("longvideobench", case)
    result = longvideobench.score(rows)
    assert result["extracted"] == [item["parsed"] for item in expected["items"]]
    right = [float(item["parsed"] == item["answer"]) for item in expected["items"]]
    assert result["items"] == right
    assert ["ABCDE"[row["correct_choice"]] for row in rows] == [item["answer"] for item in expected["items"]]
    assert result["score"] == pytest.approx(expected["overall"], abs=1e-12)
    assert result["per_level"] == exactly(expected["by_level"])


@pytest.mark.parametrize("bench, key", [(mlvu, "m_avg_dev"), (videomme, "overall")])
@pytest.mark.parametrize("case", CASES)
def test_older_release(bench, key, case):
    rows, expected = samples(bench.BENCHMARK.name, case)
    result = bench.score(rows, release="0.5")
    assert result["extracted"] == expected["harness_0_5"]["extracted"]
    assert result["score"] == exactly(expected["harness_0_5"][key])


@pytest.mark.parametrize("case", CASES)
def test_further_images(case):
    rows, expected = samples("ai2d", case)
    result = ai2d.score(rows)
    assert result["filtered"] == [item["filtered"] for item in expected["items"]]
    assert result["items"] == [item["score"] for item in expected["items"]]
    assert ["ABCD"[int(row["answer"])] for row in rows] == [item["target"] for item in expected["items"]]
    assert result["score"] == exactly(expected["exact_match"])

    rows, expected = samples("chartqa", case)
    result = chartqa.score(rows)
    assert result["items"] == [item["score"] for item in expected["items"]]
    assert result["score"] == exactly(expected["relaxed_overall"])
    assert result["per_type"] == exactly(
        {"augmented_test": expected["relaxed_augmented_split"], "human_test": expected["relaxed_human_split"]}
    )

    rows, expected = samples("ocrbench", case)
    result = ocrbench.score(rows)
    assert result["items"] == [item["score"] for item in expected["items"]]
    assert result["score"] == expected["points"]
    assert result["harness_final"] == exactly(expected["harness_final"])
    assert result["per_question_type"] == expected["per_question_type"]

    rows, expected = samples("hallusionbench", case)
    free = hallusionbench.score(rows)
    judged = hallusionbench.score(rows, [int(row["judged"]) for row in rows])
    for result, key, unit in ((free, "judge_free_substring_rule", 1), (judged, "with_given_judgements", 100)):
        assert unit * result["score"] == exactly(expected[key]["aAcc"])
        assert unit * result["qAcc"] == exactly(expected[key]["qAcc"])
        assert unit * result["fAcc"] == exactly(expected[key]["fAcc"])


# What lmms-eval's functions gave for these texts.


@pytest.mark.parametrize(
    "text, letter",
    [
        ("b. lemon", ""),
        ("A man stands there", "A"),
        ("(C) or (D)", "D"),
        ("答案是B，因为", "B"),
        ("CAN", "A"),
        ("", ""),
        ("The answer is B because Dogs bark", "D"),
        ("the best option is the cat, C maybe", "C"),
        ("DNA, and B CAD", "D"),
        ("是B", "B"),
        ("B是对的", "B"),
        ("答案是DNA", "A"),
        ("x A: y B: z", "B"),
        ("(A) and (B) and C.", "C"),
        ("The choice is option B (not A)", "A"),
        ("D. no wait, C", "D"),
        ('"C" it is', "C"),
        ("answer is A. The answer is B. fine", "B"),
        ("  . , C", "C"),
        ("The Answer Is not d", "A"),
    ],
)
def test_general_letter(text, letter):
    assert general_letter(text) == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("C.canoe", "C"),
        ("a.m. noon", "A"),
        ("B.", "B"),
        ("_A_\nB", "A"),
        ("D. one\ntwo", "D"),
        ("1,000 (d)", "D"),
        ("x.b.y", ""),
        ("c\n.x", "C"),
        ("“b”", "B"),
        ("Both A and B", "A"),
    ],
)
def test_mvbench_letter(text, letter):
    assert mvbench_letter(text) == letter


def test_ocrbench_of_the_older_release():
    def points(dataset, prediction, answer):
        row = {"dataset": dataset, "question_type": "t", "prediction": prediction, "answer": answer}
        return ocrbench.score([row])["score"], ocrbench.score([row], release="0.5")["score"]

    assert points("x", "ＥＸＩＴ", "exit") == (1, 0)
    assert points("HME100k", "x + Y", "x+Y") == (1, 0)
    assert points("HME100k", "x + y", ["z", "x+y"]) == (1, 1)


def test_pope_beyond_the_goldens():
    """Answers in excess of the labels, ids that nobody asked, lists that word a question differently."""
    questions = [
        {"question_id": 20_000_001 + i, "image": f"{i}.jpg", "text": f"Is there a {i}?\nShort.", "category": "popular"}
        for i in range(2)
    ]
    labels = {"popular": [{"question_id": 1 + i, "image": f"{i}.jpg", "text": "?", "label": "yes"} for i in range(2)]}
    answers = [{"question_id": 20_000_001 + i % 2, "text": text} for i, text in enumerate(("Yes", "no", "No", "yes"))]
    part = pope.score(answers, questions, labels, compat=True)["categories"]["popular"]
    assert (part["samples"], part["TP"], part["FN"], part["accuracy"], part["yes_ratio"]) == (4, 1, 1, 0.5, 0.5)
    assert pope.score(answers[:2], questions, labels)["accuracy"] == 50.0
    with pytest.raises(ValueError, match="to no POPE question"):
        pope.score([{"question_id": 7, "text": "no"}], questions, labels)


def test_mme_one_question_twice_and_the_other_not_at_all():
    path, _ = folder("mme", "case1")
    answers = read_whole_lines(path / "answers.jsonl")
    truth = mme.read_truth(path / "MME_Benchmark_release_version")
    with pytest.raises(ValueError, match="not one answer to each"):
        mme.score(mme.rows([answers[0], *answers[:1], *answers[2:]], truth))


def test_mmbench_option_that_the_model_is_not_shown():
    row = {"A": "red", "B": "none", "C": "two", "D": None}
    assert shown_options(row) == {"A": "red"}
    assert mmbench.extract("none", named_options(row)) == "B"
