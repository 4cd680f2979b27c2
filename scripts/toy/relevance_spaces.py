"""How well relevance ranks the patches of the asked object on the toy: in CLIP's space, and in the language model's.

    python scripts/toy/relevance_spaces.py --scenes 48

Prints the mean area under the ROC curve of each (0.5 is chance), one JSON object. The second space is what a host of
the Transformers library offers to a pruner when no joint space is named.
"""

from __future__ import annotations

import argparse
import json
from statistics import fmean

import torch
from results import area_under_curve, build_world

from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model
from llava.pruning.functional import relevance_scores


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=48)
    options = parser.parse_args()
    tokenizer, model, image_processor, _ = load_pretrained_model(DEFAULT_CHECKPOINT, device="cpu")
    world = build_world(model, image_processor, options.scenes, 3)
    tower, table = model.get_vision_tower(), model.get_input_embeddings()
    patches = world.encoded.image_embeds(tower)
    areas: dict[str, list[float]] = {"clip": [], "language model": []}
    for asked in world.asked:
        if not asked.target.any():
            continue
        ids = torch.tensor(tokenizer(asked.question.text, add_special_tokens=False).input_ids)
        text, mask = tower.text_embeds([asked.question.text])
        scores = {
            "clip": relevance_scores(patches[asked.scene][None], text, mask, model.relevance_sign),
            "language model": relevance_scores(
                world.encoded.features[asked.scene][None], table(ids).mean(0)[None, None]
            ),
        }
        shown = world.encoded.layouts[asked.scene].eligible[0].numpy()
        for space, score in scores.items():
            areas[space].append(area_under_curve(score[0].numpy()[shown], asked.target[shown]))
    print(json.dumps({"questions": len(areas["clip"]), **{space: round(fmean(a), 3) for space, a in areas.items()}}))


if __name__ == "__main__":
    main()
