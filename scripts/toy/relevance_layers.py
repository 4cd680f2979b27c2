"""In CLIP's joint space, layer by layer: how well a question finds the patches that it asks about, with which sign.

    python scripts/toy/relevance_layers.py

The patches of every layer of the vision tower go through its last norm and projection, as TRIM, CDPruner and Script
read them, and are compared with the projected question. Layer 0 is the embedding, the last but one what LLaVA reads,
the last the layer whose class token alone was trained against text. Area under the ROC curve: above 0.5 the patches
that show the asked object are *more* similar to the question than others, below it less (the sign is reversed).

Also: how often a scene's class token finds its own caption, and a caption its scene, among those of other scenes.
Prints tables and, on the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from files import write_text
from scenes import make_scene, scene_rng
from torch import Tensor
from tower import joint_text, joint_vision
from tqdm import tqdm
from train_joint import scene_caption
from transformers import CLIPModel, CLIPTokenizer
from world import FIRST_SCENE, POINTED, area_under_curve, draw_world

from llava.eval.measure.how_made import how_made
from llava.mm_utils import process_images
from llava.model.builder import TOY_FOLDER
from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor

PER_SKILL = 3
WORLDS = ("ordinary", "crowded")


class Padded:
    """The configuration that `process_images` asks for: LLaVA-1.5's."""

    image_aspect_ratio = "pad"


def texts_of(clip: CLIPModel, tokenizer, texts: Sequence[str]) -> Tensor:
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt")
    return joint_text(clip, {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask})


def measure(clip: CLIPModel, tokenizer, processor, scenes: int, crowded: bool) -> dict:
    """Areas by layer and skill, and the share of right matches of class tokens with captions."""
    pictures, asked = draw_world(scenes, PER_SKILL, crowded=crowded)
    questions = texts_of(clip, tokenizer, [one.question.text for one in asked])
    areas: dict[int, dict[str, list[float]]] = {}
    whole = []
    for scene, picture in enumerate(tqdm(pictures, desc="scenes", disable=None)):
        pixels = process_images([picture], processor, Padded())
        states = clip.vision_model(pixels, output_hidden_states=True).hidden_states
        whole.append(joint_vision(clip, states[-1][:, 0]))
        about = [(number, one) for number, one in enumerate(asked) if one.scene == scene and one.target.any()]
        for layer, hidden in enumerate(states):
            patches = joint_vision(clip, hidden[0, 1:])
            for number, one in about:
                score = (patches @ questions[number]).numpy()
                areas.setdefault(layer, {skill: [] for skill in POINTED})[one.skill].append(
                    area_under_curve(score, one.target)
                )
    captions = []
    for scene in range(scenes):
        layout = make_scene("test", FIRST_SCENE + scene, crowded=crowded).layout
        rng = scene_rng("test", FIRST_SCENE + scene, purpose=24)
        captions.append(scene_caption(layout, list(range(len(layout.objects))), rng))
    logits = torch.cat(whole) @ texts_of(clip, tokenizer, captions).T
    own = torch.arange(scenes)
    return {
        "layers": {layer: {skill: cell(values) for skill, values in row.items()} for layer, row in areas.items()},
        "matches": {
            "among": scenes,
            "picture to caption": (logits.argmax(1) == own).float().mean().item(),
            "caption to picture": (logits.argmax(0) == own).float().mean().item(),
        },
    }


def cell(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {
        "auc": round(statistics.fmean(values), 4),
        "standard_error": round(error, 4),
        "below_half": round(float(np.mean(np.array(values) < 0.5)), 4),
        "questions": len(values),
    }


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, default=TOY_FOLDER / "clip-toy-336")
    parser.add_argument("--scenes", type=int, default=96, help="of each world (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here, with how they were made")
    options = parser.parse_args(given)
    clip = CLIPModel.from_pretrained(options.clip, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(options.clip)
    processor = CLIPImageProcessor.from_pretrained(options.clip)
    report = how_made("python scripts/toy/relevance_layers.py", given)
    for world in WORLDS:
        report[world] = measure(clip, tokenizer, processor, options.scenes, world == "crowded")
        print(f"{world:10s}" + "".join(f"{skill:>18s}" for skill in POINTED))
        for layer, row in report[world]["layers"].items():
            cells = (f"{row[skill]['auc']:.3f} +- {row[skill]['standard_error']:.3f}" for skill in POINTED)
            print(f"layer {layer:<4d}" + "".join(f"{shown:>18s}" for shown in cells))
        print(", ".join(f"{name} {value:.3g}" for name, value in report[world]["matches"].items()))
    if options.json is not None:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
