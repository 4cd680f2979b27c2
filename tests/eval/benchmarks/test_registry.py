"""One file a benchmark: what is there, and that a file more is all that a new one takes."""

from llava.eval import benchmarks
from llava.eval.benchmarks import ALL_BENCHMARKS, BENCHMARKS, COLUMNS, HARNESS_TASKS, SCALES

NEW = """
from llava.eval.benchmarks.base import HarnessTask, OwnBenchmark


class Riddles(OwnBenchmark):
    name, columns, place = "riddles", {"riddles": "Riddles"}, 3.5
    section, folder, question_file = "Riddles", "riddles", "riddles.jsonl"
    harness = HarnessTask("riddles_val", ("acc",))

    def score(self, run):
        return {"metric": "number", "score": float(len(run.answers())), "items": {}}


BENCHMARK = Riddles()
"""


def test_a_new_file_is_a_new_benchmark(tmp_path, monkeypatch):
    (tmp_path / "riddles.py").write_text(NEW)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    found = benchmarks._find()
    assert [one.name for one in found if one.name not in ALL_BENCHMARKS] == ["riddles"]
    assert [one.name for one in found][2:5] == ["vizwiz", "riddles", "sqa"]


def test_names_and_columns_are_there_once():
    assert len(BENCHMARKS) == 10
    assert len(ALL_BENCHMARKS) == 18
    for name, one in ALL_BENCHMARKS.items():
        assert name == one.name == next(iter(one.columns))
        assert set(dict(one.harness.parts) if one.harness else {}) <= one.columns.keys()
    assert len(COLUMNS) == sum(len(one.columns) for one in ALL_BENCHMARKS.values())
    assert len({one.place for one in ALL_BENCHMARKS.values()}) == len(ALL_BENCHMARKS)
    assert len({task.task for task in HARNESS_TASKS.values()}) == len(HARNESS_TASKS)


def test_paper_tables_order_and_scales():
    assert list(COLUMNS)[:6] == ["vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope"]
    assert SCALES == {"mme": 20.0, "ocrbench": 10.0}
