"""Questions of one's own about golden pictures, and the arguments that ask a tiny checkpoint about them."""

import json
import shutil

from records import GOLDEN

CHECKPOINT = str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")
PICTURES = ("square336.png", "small97x61.png", "land640x480.png")


def write_questions(folder, count=12):
    """``count`` questions, the sixth without a picture; returns the arguments of the runner that ask them."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for name in PICTURES:
        shutil.copy(GOLDEN / "images" / name, pictures)
    lines = [
        {
            "question_id": i // 2,
            "image": PICTURES[i % 3],
            "text": "What is there? " + "Look. " * (i % 4),
            "category": "x",
        }
        for i in range(count)
    ]
    if count > 5:
        del lines[5]["image"]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        *("--question-file", str(folder / "questions.jsonl"), "--image-folder", str(pictures)),
        *("--model-path", CHECKPOINT, "--keep-tokens", "5", "--max-new-tokens", "6", "--device", "cpu"),
    ]
