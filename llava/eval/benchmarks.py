"""The ten image benchmarks: where their files are, what is asked, and where answers go.

Question lists and everything written live under ``playground/data/eval`` (the output root); images and annotations may
live elsewhere (the data root), laid out in the same way. EVAL.md describes every file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.constants import ANSWER_FORMAT_INSTRUCTIONS, DEFAULT_IMAGE_TOKEN
from llava.eval.files import MissingFile, read_json, read_table, read_whole_lines, require
from llava.eval.scorers.mmbench import is_missing, shown_options

OUTPUT_ROOT = Path("playground/data/eval")
LETTER_INSTRUCTION, LETTER_INSTRUCTION_CN = ANSWER_FORMAT_INSTRUCTIONS[1], ANSWER_FORMAT_INSTRUCTIONS[2]
TILES = 5  # views of a LLaVA-1.6 image in the layout that run tags count by: an overview and four tiles


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Args:
        question_id: as in the question list; not unique in every benchmark.
        text: what follows the image placeholder, answer instruction included.
        prompt: what the answer line records.
        image: the picture's file; ``None`` for a question without one.
        image_data: the picture as base64 text, where the table holds it.
        extra: further fields of the answer line.
    """

    question_id: int | str
    text: str
    prompt: str
    image: Path | None = None
    image_data: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def has_image(self) -> bool:
        return self.image is not None or self.image_data is not None


@dataclass(frozen=True)
class Benchmark:
    """Files and settings of a benchmark.

    Args:
        section: its heading in EVAL.md.
        folder: under the roots.
        question_file, image_folder: under ``folder``.
        max_new_tokens: limit of an answer.
        chunked: whether answers are ``<tag>/<chunks>_<i>.jsonl`` and ``<tag>/merge.jsonl``, or ``<tag>.jsonl``.
    """

    name: str
    section: str
    folder: str
    question_file: str
    image_folder: str = ""
    max_new_tokens: int = 128
    chunked: bool = False

    def answers_file(self, root: Path, question_file: Path, checkpoint: str, tag: str) -> Path:
        """Where the (merged) answers of a run stand."""
        place = root / self.folder / "answers" / question_file.stem / checkpoint
        return place / tag / "merge.jsonl" if self.chunked else place / f"{tag}.jsonl"


_ALL = (
    Benchmark("vqav2", "VQAv2", "vqav2", "llava_vqav2_mscoco_test-dev2015.jsonl", "test2015", chunked=True),
    Benchmark("gqa", "GQA", "gqa", "llava_gqa_testdev_balanced.jsonl", "data/images", chunked=True),
    Benchmark("vizwiz", "VizWiz", "vizwiz", "llava_test.jsonl", "test"),
    Benchmark("sqa", "ScienceQA", "scienceqa", "llava_test_CQM-A.json", "images/test", 1024),
    Benchmark("textvqa", "TextVQA", "textvqa", "llava_textvqa_val_v051_ocr.jsonl", "train_images"),
    Benchmark("pope", "POPE", "pope", "llava_pope_test.jsonl", "val2014"),
    Benchmark("mme", "MME", "MME", "llava_mme.jsonl", "MME_Benchmark_release_version"),
    Benchmark("mmbench", "MMBench", "mmbench", "mmbench_dev_20230712.tsv", max_new_tokens=1024),
    Benchmark("mmbench_cn", "MMBench-CN", "mmbench_cn", "mmbench_dev_cn_20231003.tsv", max_new_tokens=1024),
    Benchmark("mmvet", "MM-Vet", "mm-vet", "llava-mm-vet.jsonl", "images", 1024),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def locate(roots: Sequence[Path], relative: str, section: str, kind: str = "file") -> Path:
    """The first of ``roots`` that has ``relative``. Raises MissingFile naming the place under the first root."""
    for root in roots:
        try:
            return require(Path(root) / relative, section, kind)
        except MissingFile:
            continue
    return require(Path(roots[0]) / relative, section, kind)


def find_questions(benchmark: Benchmark, data_root: Path, output_root: Path) -> Path:
    """The question list: of the data root if it has one (the toy has), else under the output root."""
    wanted = f"{benchmark.folder}/{benchmark.question_file}"
    if (Path(data_root) / wanted).is_file():
        return Path(data_root) / wanted
    if benchmark.name == "mmbench_cn":  # some guides put it beside the English table
        beside = f"mmbench/{benchmark.question_file}"
        if any((Path(root) / beside).is_file() for root in (data_root, output_root)):
            return locate([output_root, data_root], beside, benchmark.section)
    return locate([output_root], wanted, benchmark.section)


def load_questions(name: str | None, question_file: Path, image_folder: Path | None) -> list[Question]:
    """The questions of a benchmark, or of anyone's own JSON-lines file (``name`` None), in their order.

    Raises:
        ValueError: a damaged file, or a line without the fields that it needs; names the line.
    """
    if name in ("mmbench", "mmbench_cn") or (name is None and question_file.suffix == ".tsv"):
        instruction = LETTER_INSTRUCTION_CN if name == "mmbench_cn" else LETTER_INSTRUCTION
        return [_from_table(row, instruction) for row in read_table(question_file)]
    if name == "sqa":
        return [_from_conversation(entry, image_folder) for entry in read_json(question_file)]
    return [
        _from_line(number, line, question_file, image_folder)
        for number, line in enumerate(read_whole_lines(question_file), start=1)
    ]


def _from_line(number: int, line: dict, file: Path, folder: Path | None) -> Question:
    missing = [name for name in ("question_id", "text") if name not in line]
    if missing:
        raise ValueError(f"{file}, question {number}, lacks {' and '.join(missing)}")
    text = (
        line["text"].replace(DEFAULT_IMAGE_TOKEN, "").strip() if DEFAULT_IMAGE_TOKEN in line["text"] else line["text"]
    )
    image = line.get("image")
    return Question(line["question_id"], text, text, None if image is None else Path(folder or "") / image)


def _from_conversation(entry: dict, folder: Path) -> Question:
    asked = entry["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    text = f"{asked}\n{LETTER_INSTRUCTION}"
    if "image" not in entry:
        return Question(entry["id"], text, text)
    return Question(entry["id"], text, f"{DEFAULT_IMAGE_TOKEN}\n{text}", folder / entry["image"])


def _from_table(row: dict, instruction: str) -> Question:
    options = shown_options(row)
    lines = [] if is_missing(row.get("hint")) else [row["hint"]]
    lines += [row["question"] or "", *(f"{letter}. {option}" for letter, option in options.items())]
    prompt = "\n".join(lines)
    extra = {"round_id": 0, "options": list(options.values()), "option_char": list(options)}
    return Question(int(row["index"]), f"{prompt}\n{instruction}", prompt, image_data=row["image"], extra=extra)


def run_tag(
    keep_tokens: int | float | None, tiled: bool, pruner: str = "script", options: Sequence[str] = (), seed: int = 0
) -> str:
    """Name of a run: ``vtn_<tokens per picture>``; methods, options and seeds other than the default are added."""
    if keep_tokens is None:
        name = "full"
    else:
        name = f"vtn_{keep_tokens * TILES if tiled and isinstance(keep_tokens, int) else keep_tokens}"
        if pruner != "script" or options:
            name = "-".join([name, pruner, *(option.replace("/", "_") for option in options)])
    return f"{name}-seed{seed}" if seed else name
