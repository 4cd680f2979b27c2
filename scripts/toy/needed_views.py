"""Tiles that the question does not need: right answers of the NeXT toy, and what its tower never sees.

    python scripts/toy/needed_views.py

Crowded scenes of the toy's test split, read as an overview and tiles. Each row leaves out the tiles that hold less
than a share of the overview's most relevant patches (llava/model/needed_views.py): "tokens per view" gives every view
that is read its budget, "the same tokens" shares the budget of all views out among those.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from scenes import make_scene, scene_rng
from tqdm import tqdm
from world import FIRST_SCENE, SKILLS, SUFFIX

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import TOY_FOLDER, load_pretrained_model
from llava.model.needed_views import encode_needed
from llava.pruning import get_pruner

Case = tuple[object, str, str]  # picture, question, answer


def cases_of(scenes: int, per_skill: int) -> list[Case]:
    """Questions about scenes that neither training nor the committed test sets contain."""
    found = []
    for number in range(FIRST_SCENE, FIRST_SCENE + scenes):
        scene, rng = make_scene("test", number), scene_rng("test", number, purpose=9)
        for makers in SKILLS.values():
            questions: dict[str, str] = {}
            for _ in range(20 * per_skill):
                if len(questions) < per_skill:
                    question = makers[int(rng.integers(len(makers)))](scene.layout, rng)
                    if question is not None:
                        questions.setdefault(question.text, question.answer)
            found += [(scene.image, text, answer) for text, answer in questions.items()]
    return found


@torch.inference_mode()
def run(loaded: tuple, cases: list[Case], keep: int, least: float | None, same: bool, relevance: str) -> list:
    """Of each question: whether it is answered right, views that were read, and visual tokens."""
    tokenizer, model, processor, _ = loaded
    method = get_pruner("script", keep_tokens=keep, relevance=relevance)
    found = []
    for picture, question, answer in tqdm(cases, desc=f"least {least}", leave=False):
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message("USER", f"<image>\n{question}{SUFFIX}")
        conversation.append_message("ASSISTANT", None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
        shown = model.visuals(process_images([picture], processor, model.config), [picture.size])
        views, own, images = len(shown.each[0].pixels), method, shown
        if least is not None:
            images, needed = encode_needed(model, shown, [question], method, least)
            if same:
                own = replace(method, keep_tokens=keep * views // len(needed[0]))
            views = len(needed[0])
        prompt = model.embed_prompts(ids, images=images, pruner=own, query=question)
        output = model.generate(prompt, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(output[0], skip_special_tokens=True).strip()
        found.append((text.lower() == answer.lower(), views, len(prompt.kept[0].sequence)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(TOY_FOLDER / "llava-toy-v1.6"))
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--per-skill", type=int, default=2, help="questions of each skill about a scene")
    parser.add_argument("--keep-tokens", type=int, nargs="+", default=[32])
    parser.add_argument("--least", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--relevance", default="auto", help="where the question is read, as for script")
    options = parser.parse_args()
    loaded = load_pretrained_model(options.model_path, device="cpu")
    cases = cases_of(options.scenes, options.per_skill)
    print(f"{len(cases)} questions\n")
    print("| tokens per view | tiles left out | views read | visual tokens | right, % | agrees with all tiles, % |")
    print("|---|---|---|---|---|---|")
    for keep in options.keep_tokens:
        rows = [("none", None, False)]
        for least in options.least:
            rows += [(f"below {least:g}", least, False), (f"below {least:g}, the same tokens", least, True)]
        every = None
        for label, least, same in rows:
            found = run(loaded, cases, keep, least, same, options.relevance)
            right, views, tokens = (statistics.fmean(column) for column in zip(*found, strict=True))
            every = found if every is None else every
            agrees = statistics.fmean(one[0] == other[0] for one, other in zip(found, every, strict=True))
            print(
                f"| {keep} | {label} | {views:.2f} | {tokens:.0f} | {100 * right:.1f} | {100 * agrees:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
