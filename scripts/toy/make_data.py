"""Write the toy's test sets in the file formats of the ten benchmarks.

    python scripts/toy/make_data.py --root playground/toy/data

Every benchmark folder also gets ``boxes.json.gz``: ``images`` (file or row -> size, background, objects with their
boxes) and ``targets`` (for each question, in the order of the question list, the indices of the objects that it asks
about).
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import questions as q
from files import write_bytes, write_text
from formats import INSUFFICIENT, SHORT, YES_NO, ocr_line
from PIL import Image
from questions import Question
from scenes import BACKGROUNDS, COMPACT_SIZES, SIGN, TEXTS, Layout, Scene, make_scene, scene_rng
from tqdm import tqdm

# For the benchmarks that need many pictures: a plain pattern makes a PNG of 4 kB, a smooth one a JPEG of 8 kB.
PATTERNED = BACKGROUNDS[:4]
SMOOTH = ("clouds",)
HUMANS = 10


def jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=54, optimize=True)
    return data.getvalue()


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.quantize(32, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    return data.getvalue()


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path: Path, data) -> None:
    write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")


class Boxes:
    """Collects ``boxes.json.gz``."""

    def __init__(self) -> None:
        self.images: dict[str, dict] = {}
        self.targets: list[list[int]] = []

    def image(self, name: str, layout: Layout) -> None:
        self.images[name] = {"size": list(layout.size), "background": layout.background, "objects": layout.boxes()}

    def question(self, question: Question, layout: Layout) -> None:
        self.targets.append(question.targets(layout))

    def write(self, folder: Path) -> None:
        data = {"images": self.images, "targets": self.targets}
        text = json.dumps(data, separators=(",", ":")) + "\n"
        write_bytes(folder / "boxes.json.gz", gzip.compress(text.encode("utf-8"), mtime=0))


def scenes_for(
    first: int, number: int, backgrounds: tuple[str, ...] | None = None, signs: int = 1
) -> Iterator[tuple[Scene, np.random.Generator]]:
    """``number`` test scenes from index ``first`` on that hold at least ``signs`` signs; where ``backgrounds`` are
    given the pictures are also among the smaller ones.
    """
    index = first
    while number:
        scene = make_scene("test", index, backgrounds, COMPACT_SIZES) if backgrounds else make_scene("test", index)
        if sum(thing.shape == SIGN for thing in scene.layout.objects) >= signs:
            yield scene, scene_rng("test", index, 2)
            number -= 1
        index += 1


def distinct(layout: Layout, rng: np.random.Generator, makers, number: int) -> list[Question]:
    """``number`` different questions, the makers taken in turn."""
    found: dict[str, Question] = {}
    for attempt in range(20 * number):
        question = makers[attempt % len(makers)](layout, rng)
        if question is not None and len(found) < number:
            found.setdefault(question.text, question)
    return list(found.values())


def human_answers(question: Question, rng: np.random.Generator, slips: tuple[str, ...]) -> list[str]:
    """Ten answers as people give them: seven to ten agree, the rest slip."""
    wrong = rng.integers(0, 4)
    answers = [question.answer.lower()] * (HUMANS - wrong) + [str(rng.choice(slips)) for _ in range(wrong)]
    return [answers[k] for k in rng.permutation(HUMANS)]


def make_pope(folder: Path, images: int = 28) -> None:
    boxes, rows = Boxes(), {"adversarial": [], "random": [], "popular": []}
    ids = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}
    asked: dict[str, list] = {name: [] for name in rows}
    for number, (scene, rng) in enumerate(scenes_for(10_000, images)):
        layout, name = scene.layout, f"COCO_val2014_{910_001 + number:012d}.jpg"
        write_bytes(folder / "val2014" / name, jpeg(scene.image))
        boxes.image(name, layout)
        present = [layout.objects[k] for k in rng.permutation(len(layout.objects))[:3]]
        for category in rows:
            absent = q.absent_pairs(layout, category, rng)[:3]
            asked_pairs = [(thing.shape, thing.color, "yes") for thing in present] + [(*pair, "no") for pair in absent]
            for shape, color, label in asked_pairs:
                text = f"Is there {q.article(f'{color} {shape}')} in the image?"
                line = {"question_id": ids[category] + len(rows[category]), "image": name, "text": text}
                rows[category].append({**line, "label": label})
                asked[category].append((Question(text, "", "existence", (q.Descriptor(shape, color),)), layout))
    questions = []
    for category, lines in rows.items():
        write_text(folder / "coco" / f"coco_pope_{category}.json", json_lines(lines))
        for line, (question, layout) in zip(lines, asked[category], strict=True):
            plain = {key: line[key] for key in ("question_id", "image")}
            questions.append({**plain, "text": line["text"] + SHORT, "category": category})
            boxes.question(question, layout)
    write_text(folder / "llava_pope_test.jsonl", json_lines(questions))
    boxes.write(folder)


# structural and semantic type, detailed type, local group, reasoning steps
_GQA_TYPES: dict[Callable, tuple[str, str, str, str, int]] = {
    q.color_of: ("query", "attr", "directOf", "color", 2),
    q.shape_of: ("query", "cat", "categoryThat", "object", 2),
    q.color_check: ("verify", "attr", "verifyAttr", "color", 2),
    q.relation: ("verify", "rel", "relVerify", "position", 3),
    q.relation_choice: ("choose", "rel", "relChooser", "position", 3),
    q.half: ("choose", "attr", "positionChoose", "position", 2),
    q.both: ("logical", "obj", "existAnd", "exist", 4),
    q.same_color: ("compare", "attr", "twoSame", "color", 3),
    q.background_check: ("verify", "global", "verifyGlobal", "background", 1),
}
_GQA_GROUPS = {"color": "color", "position": "direction", "object": "object"}


def _gqa_record(question: Question, image: str, key: str, maker: Callable) -> dict:
    structural, semantic, detailed, local, steps = _GQA_TYPES[maker]
    operations = [{"operation": "select", "dependencies": [], "argument": local}]
    operations += [{"operation": structural, "dependencies": [k], "argument": local} for k in range(steps - 1)]
    answer = question.answer.lower()
    return {
        "semantic": operations,
        "entailed": [],
        "equivalent": [key],
        "question": question.text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": _GQA_GROUPS.get(local) if answer not in ("yes", "no") else None, "local": f"toy-{local}"},
        "answer": answer,
        "semanticStr": "",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
        "fullAnswer": f"{question.answer}.",
    }


def make_gqa(folder: Path, images: int = 34) -> None:
    boxes, lines, records = Boxes(), [], {}
    for number, (scene, rng) in enumerate(scenes_for(20_000, images)):
        image = f"n{300_001 + number}"
        write_bytes(folder / "data" / "images" / f"{image}.jpg", jpeg(scene.image))
        boxes.image(f"{image}.jpg", scene.layout)
        for position, maker in enumerate(_GQA_TYPES):
            question = maker(scene.layout, rng)
            if question is None:
                continue
            key = str(21_000_000 + 100 * number + position)
            line = {"question_id": key, "image": f"{image}.jpg", "text": question.text + SHORT, "category": "default"}
            lines.append(line)
            records[key] = _gqa_record(question, image, key, maker)
            boxes.question(question, scene.layout)
    write_text(folder / "llava_gqa_testdev_balanced.jsonl", json_lines(lines))
    write_text(folder / "data" / "testdev_balanced_questions.json", json.dumps(records, ensure_ascii=False) + "\n")
    boxes.write(folder)


_VQA_SLIPS = ("not sure", "object", "gray", "4", "none")


def _vqa_annotation(question: Question, answers: list[str], image_id: int, question_id: int) -> dict:
    answer = question.answer.lower()
    kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    return {
        "question_type": " ".join(question.text.lower().rstrip("?").split()[:2]),
        "multiple_choice_answer": answer,
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k + 1} for k, a in enumerate(answers)],
        "image_id": image_id,
        "answer_type": kind,
        "question_id": question_id,
    }


def make_vqav2(folder: Path, images: int = 32) -> None:
    makers = (q.color_of, q.existence, q.written_on, q.count, q.shape_of, q.color_check, q.existence, q.color_of_text)
    boxes, lines, annotations, plain = Boxes(), [], [], []
    for number, (scene, rng) in enumerate(scenes_for(30_000, images)):
        image_id = 900_001 + number
        name = f"COCO_test2015_{image_id:012d}.jpg"
        write_bytes(folder / "test2015" / name, jpeg(scene.image))
        boxes.image(name, scene.layout)
        for position, question in enumerate(distinct(scene.layout, rng, makers, 8)):
            key = image_id * 1000 + position
            lines.append({"question_id": key, "image": name, "text": question.text + SHORT, "category": "default"})
            annotations.append(_vqa_annotation(question, human_answers(question, rng, _VQA_SLIPS), image_id, key))
            plain.append({"image_id": image_id, "question": question.text, "question_id": key})
            boxes.question(question, scene.layout)
    for name in ("llava_vqav2_mscoco_test-dev2015", "llava_vqav2_mscoco_test2015"):
        write_text(folder / f"{name}.jsonl", json_lines(lines))
    # The toy's test questions come with answers, under the names of the local split.
    head = {"info": {"description": "toy scenes", "version": "2.0"}, "license": {}, "data_subtype": "val2014"}
    kinds = {**head, "data_type": "mscoco", "task_type": "Open-Ended"}
    dump = {"v2_mscoco_val2014_annotations": {**head, "data_type": "mscoco", "annotations": annotations}}
    dump["v2_OpenEnded_mscoco_val2014_questions"] = {**kinds, "questions": plain}
    for name, data in dump.items():
        write_text(folder / f"{name}.json", json.dumps(data) + "\n")
    boxes.write(folder)


def make_vizwiz(folder: Path, images: int = 200) -> None:
    """One question per picture, as the original: its answers are matched by picture."""
    makers = (q.color_of, q.written_on, q.color_of_text, q.shape_of, q.color_check)
    boxes, lines, plain, truth = Boxes(), [], [], []
    for number, (scene, rng) in enumerate(scenes_for(40_000, images, SMOOTH)):
        name = f"VizWiz_test_{number:08d}.jpg"
        write_bytes(folder / "test" / name, jpeg(scene.image))
        boxes.image(name, scene.layout)
        answerable = bool(rng.random() < 0.7)
        question = distinct(scene.layout, rng, makers if answerable else (q.unanswerable,), 1 + number % 3)[-1]
        slips = ("unanswerable", "unsuitable") if answerable else ("unsuitable", "gray", "14")
        answers = human_answers(question, rng, slips)
        kind = "unanswerable" if not answerable else "yes/no" if question.answer in (q.YES, q.NO) else "other"
        if answerable and question.answer.isdigit():
            kind = "number"
        text = question.text + INSUFFICIENT + SHORT
        lines.append({"question_id": number, "image": name, "text": text, "category": "default"})
        plain.append({"image": name, "question": question.text})
        given = [{"answer_confidence": "yes", "answer": answer} for answer in answers]
        truth.append({**plain[-1], "answers": given, "answer_type": kind, "answerable": int(answerable)})
        boxes.question(question, scene.layout)
    write_text(folder / "llava_test.jsonl", json_lines(lines))
    write_text(folder / "test.json", json.dumps(plain) + "\n")
    write_text(folder / "val.json", json.dumps(truth) + "\n")
    boxes.write(folder)


def make_textvqa(folder: Path, images: int = 50) -> None:
    makers = (q.written_on, q.written_on, q.color_of_text, q.written_on, q.text_check)
    boxes, lines, records = Boxes(), [], []
    for number, (scene, rng) in enumerate(scenes_for(50_000, images, signs=2)):
        image_id = f"{number:04x}70f5ce4e00"
        write_bytes(folder / "train_images" / f"{image_id}.jpg", jpeg(scene.image))
        boxes.image(f"{image_id}.jpg", scene.layout)
        for question in distinct(scene.layout, rng, makers, 4):
            text = question.text + ocr_line(scene.layout, rng) + SHORT
            lines.append({"question_id": image_id, "image": f"{image_id}.jpg", "text": text, "category": "default"})
            records.append({
                "question_id": 40_000 + len(records),
                "question": question.text,
                "question_tokens": question.text.lower().rstrip("?").split(),
                "image_id": image_id,
                "image_classes": sorted({thing.shape for thing in scene.layout.objects}),
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "image_width": scene.layout.size[0],
                "image_height": scene.layout.size[1],
                "answers": human_answers(question, rng, ("sign", "unanswerable", str(rng.choice(TEXTS)).lower())),
                "set_name": "val",
            })  # fmt: skip
            boxes.question(question, scene.layout)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_text(folder / "TextVQA_0.5.1_val.json", json.dumps({**head, "data": records}) + "\n")
    write_text(folder / "llava_textvqa_val_v051_ocr.jsonl", json_lines(lines))
    boxes.write(folder)


def make_scienceqa(folder: Path, problems: int = 200) -> None:
    boxes, records, items = Boxes(), {}, []
    subjects = {"attribute choice": ("natural science", "physics"), "text choice": ("language science", "reading")}
    for number, (scene, rng) in enumerate(scenes_for(60_000, problems, PATTERNED)):
        key = str(50_001 + 3 * number)
        question = distinct(scene.layout, rng, (q.multiple_choice,), 1)[0]
        write_bytes(folder / "images" / "test" / key / "image.png", png(scene.image))
        boxes.image(f"{key}/image.png", scene.layout)
        boxes.question(question, scene.layout)
        subject, topic = subjects[question.kind]
        records[key] = {
            "question": question.text, "choices": list(question.options), "answer": q.LETTERS.index(question.answer),
            "hint": question.hint, "image": "image.png", "task": "closed choice", "grade": "grade2",
            "subject": subject, "topic": topic, "category": "Scenes", "skill": "Look", "lecture": "", "solution": "",
            "split": "test",
        }  # fmt: skip
        text = question.with_options().replace(question.hint, f"Context: {question.hint}", 1 if question.hint else 0)
        turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": question.answer}]
        items.append({"id": key, "image": f"{key}/image.png", "conversations": turns})
    write_text(folder / "problems.json", json.dumps(records) + "\n")
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(records)})
    for name in ("llava_test_CQM-A", "llava_test_CQM-I"):
        write_text(folder / f"{name}.json", json.dumps(items, indent=1) + "\n")
    boxes.write(folder)


_MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip
_MMBENCH_CATEGORIES = {
    "attribute choice": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "text choice": ("ocr", "finegrained_perception (instance-level)"),
}


def _rotations(question: Question) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """(k, options shifted left by k, letter of the right one)."""
    right = q.LETTERS.index(question.answer)
    for k in range(len(question.options)):
        yield k, question.options[k:] + question.options[:k], q.LETTERS[(right - k) % len(question.options)]


def make_mmbench(folder: Path, folder_cn: Path, questions: int = 68) -> None:
    """English and Chinese table over the same pictures: rotation k of row i is row i + k * 1000000."""
    paths = (folder / "mmbench_dev_20230712.tsv", folder_cn / "mmbench_dev_cn_20231003.tsv")
    tables: dict[Path, list[dict]] = {path: [] for path in paths}
    boxes = Boxes()
    rotated: list[tuple[int, tuple[Question, Layout]]] = []
    for number, (scene, rng) in enumerate(scenes_for(70_000, questions, PATTERNED)):
        english = distinct(scene.layout, rng, (lambda s, r, n=2 + number % 3: q.multiple_choice(s, r, n),), 1)[0]
        picture = base64.b64encode(png(scene.image)).decode()
        index = 100 + 17 * number
        boxes.image(str(index), scene.layout)
        category, level2 = _MMBENCH_CATEGORIES[english.kind]
        for rows, question in zip(tables.values(), (english, q.to_chinese(english)), strict=True):
            for k, options, letter in _rotations(question):
                filled = dict(zip(q.LETTERS, (*options, "", "", ""), strict=False))
                rows.append({
                    "index": index + k * 1_000_000, "question": question.text, "hint": question.hint, **filled,
                    "answer": letter, "category": category, "image": picture, "source": "toy", "l2-category": level2,
                    "comment": "", "split": "dev",
                })  # fmt: skip
        rotated += [(index + k * 1_000_000, (english, scene.layout)) for k, _, _ in _rotations(english)]
    for path, rows in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, _MMBENCH_COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["index"]))
        write_text(path, text.getvalue())
    for _, (question, layout) in sorted(rotated, key=lambda pair: pair[0]):
        boxes.question(question, layout)
    boxes.write(folder)
    boxes.write(folder_cn)


def _mme_existence(layout: Layout, rng: np.random.Generator) -> tuple[str, str]:
    thing = layout.objects[rng.integers(len(layout.objects))]
    shape, color = q.absent_pairs(layout, "adversarial", rng)[0]
    nouns = (f"{thing.color} {thing.shape}", f"{color} {shape}")
    return tuple(f"Is there {q.article(noun)} in this image?" for noun in nouns)


def _mme_of(maker: Callable[[Layout, np.random.Generator], Question | None]):
    """A yes and a no question about the same thing, by drawing until both have come up."""

    def pair(layout: Layout, rng: np.random.Generator) -> tuple[str, str] | None:
        found: dict[tuple, dict[str, str]] = {}
        for _ in range(200):
            question = maker(layout, rng)
            if question is None:
                return None
            both = found.setdefault(question.asked, {})
            both[question.answer] = question.text
            if len(both) == 2:
                return both[q.YES], both[q.NO]
        return None

    return pair


def _mme_count(layout: Layout, rng: np.random.Generator) -> tuple[str, str]:
    question = q.count(layout, rng)
    plural = question.text.split()[2]
    right = int(question.answer)
    wrong = right + 1 if right == 1 or rng.random() < 0.5 else right - 1
    return f"Are there {right} {plural} in this image?", f"Are there {wrong} {plural} in this image?"


_MME_TASKS = {
    "existence": _mme_existence,
    "count": _mme_count,
    "position": _mme_of(q.relation),
    "color": _mme_of(q.color_check),
    "OCR": _mme_of(q.text_check),
    "scene": _mme_of(q.background_check),
}
# The original keeps the pictures and texts of these in two sub-folders.
_MME_SPLIT = ("scene",)


def make_mme(folder: Path, images: int = 20) -> None:
    release, boxes, lines = folder / "MME_Benchmark_release_version", Boxes(), []
    for task_number, (task, maker) in enumerate(_MME_TASKS.items()):
        scenes, number = scenes_for(80_000 + 1000 * task_number, 10 * images, PATTERNED), 0
        while number < images:
            scene, rng = next(scenes)
            pair = maker(scene.layout, rng)
            if pair is None:
                continue
            pictures, texts = ("images", "questions_answers_YN") if task in _MME_SPLIT else ("", "")
            name = f"{task[:3]}_{number:03d}"
            image = str(Path(task, pictures, f"{name}.png"))
            write_bytes(release / image, png(scene.image))
            boxes.image(image, scene.layout)
            answers = "".join(f"{text}{YES_NO}\t{answer}\n" for text, answer in zip(pair, (q.YES, q.NO), strict=True))
            write_text(release / task / texts / f"{name}.txt", answers)
            for text in pair:
                line = {"question_id": image, "image": image, "text": text + SHORT, "category": task}
                lines.append(line)
                boxes.targets.append(_named_objects(text, scene.layout))
            number += 1
    write_text(folder / "llava_mme.jsonl", json_lines(lines))
    boxes.write(folder)


def _named_objects(text: str, layout: Layout) -> list[int]:
    """Objects that an MME question names, by "colour shape", else by shape."""
    exact = [k for k, thing in enumerate(layout.objects) if f"{thing.color} {thing.shape}" in text]
    words = text.rstrip("?").replace("boxes", "box").replace("crosses", "cross").split()
    loose = [k for k, thing in enumerate(layout.objects) if thing.shape in words or f"{thing.shape}s" in words]
    return exact or loose


_VET_SKILLS = {"attribute": ["rec"], "text": ["ocr"], "free": ["rec", "gen"], "relation": ["spat"]}


def make_mmvet(folder: Path, images: int = 50) -> None:
    makers = (q.describe, q.written_on, q.color_of, q.relation_choice)
    boxes, lines, truth = Boxes(), [], {}
    for number, (scene, rng) in enumerate(scenes_for(90_000, images, PATTERNED)):
        image = f"v1_{number}.png"
        write_bytes(folder / "images" / image, png(scene.image))
        boxes.image(image, scene.layout)
        for question in distinct(scene.layout, rng, makers, 4):
            key = len(lines)
            lines.append({"image": image, "text": question.text, "category": "conv", "question_id": key})
            skills = list(_VET_SKILLS[question.kind])
            if question.kind == "free" and "sign" in question.text:
                skills = ["ocr", "gen"]
            record = {"imagename": image, "question": question.text, "answer": question.answer}
            truth[f"v1_{key}"] = {**record, "imagesource": "toy", "capability": skills}
            boxes.question(question, scene.layout)
    write_text(folder / "llava-mm-vet.jsonl", json_lines(lines))
    write_text(folder / "mm-vet.json", json.dumps(truth, indent=1) + "\n")
    boxes.write(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("playground/toy/data"), help="where eval/<benchmark> goes")
    root = parser.parse_args().root / "eval"
    jobs = (
        (make_pope, "pope"), (make_gqa, "gqa"), (make_vqav2, "vqav2"), (make_vizwiz, "vizwiz"),
        (make_textvqa, "textvqa"), (make_scienceqa, "scienceqa"), (make_mmbench, "mmbench", "mmbench_cn"),
        (make_mme, "MME"), (make_mmvet, "mm-vet"),
    )  # fmt: skip
    for make, *folders in tqdm(jobs, desc="benchmarks"):
        make(*(root / folder for folder in folders))


if __name__ == "__main__":
    main()
