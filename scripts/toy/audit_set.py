"""Questions with boxes about the toy's pictures, for the audit: two objects of each scene, the two farthest apart.

python scripts/toy/audit_set.py            # writes playground/toy/data/audit.json
python -m llava.eval.audit                 # the embedded toy is audited on it
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from math import dist
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "playground" / "toy" / "data"
PICTURES = "eval/pope/val2014"


def question(thing: dict[str, Any]) -> dict[str, Any]:
    """What is asked about an object that is the only one of its shape."""
    return {
        "text": f"What color is the {thing['shape']}?",
        "rephrased": f"Is the {thing['shape']} {thing['color']}?",
        "boxes": [thing["box"]],
        "answers": [thing["color"]],
    }


def farthest_pair(objects: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Of the objects that are the only ones of their shape, and no signs, the two whose boxes lie farthest apart."""
    count = Counter(thing["shape"] for thing in objects)
    single = [thing for thing in objects if count[thing["shape"]] == 1 and thing["shape"] != "sign"]
    pairs = combinations(single, 2)
    return max(pairs, key=lambda pair: dist(pair[0]["box"], pair[1]["box"]), default=None)


def main() -> None:
    scenes = json.loads((DATA / "eval/pope/boxes.json").read_text(encoding="utf-8"))["images"]
    entries = []
    for name, scene in scenes.items():
        pair = farthest_pair(scene["objects"])
        if pair is not None:
            entries.append({"image": f"{PICTURES}/{name}", "questions": [question(thing) for thing in pair]})
    (DATA / "audit.json").write_text(json.dumps({"pictures": entries}, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{len(entries)} pictures, {2 * len(entries)} questions")


if __name__ == "__main__":
    main()
