"""POPE with four questions a category about one small picture, laid out as the runner wants it."""

import json
import shutil

from llava.eval.benchmarks.pope import CATEGORIES
from records import GOLDEN


def write_pope(place):
    """Question list, labels and picture under ``place``; returns ``place``."""
    (place / "pope" / "val2014").mkdir(parents=True)
    (place / "pope" / "coco").mkdir()
    shutil.copy(GOLDEN / "images" / "small97x61.png", place / "pope" / "val2014" / "a.png")
    questions = []
    for group, category in enumerate(CATEGORIES):
        lines = []
        for number, thing in enumerate(("dog", "cat", "cow", "hen")):
            text = f"Is there a {thing}?"
            lines.append({"question_id": number, "image": "a.png", "text": text, "label": ["yes", "no"][number % 2]})
            asked = {"question_id": 10 * group + number, "image": "a.png", "text": text, "category": category}
            questions.append(asked)
        file = place / "pope" / "coco" / f"coco_pope_{category}.json"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "pope" / "llava_pope_test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return place
