"""Train the toy from nothing: tokenizers, CLIP, LLaVA-1.5 and, from it, LLaVA-NeXT.

    python scripts/toy/train.py
    python scripts/toy/train.py --joint-only    # CLIP's text side again, on the vision tower in --out

One run on two CPU cores takes under three hours, the text side alone ten minutes of them. Stopped at any moment, it
goes on from its last whole state; the states and the drawn scenes lie in ``--work`` (about 4 GB) and may be deleted
afterwards.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from anyres import tiled_pictures
from checkpoints import (
    CLIP_NAME,
    llava_config,
    replace_tower,
    save_clip,
    save_llama_tokenizer,
    save_llava,
)
from plot import plot_log
from tokenizers_toy import corpus, train_clip_tokenizer, train_llama_tokenizer
from train_joint import JointSettings, seen_views, train_joint
from train_language import (
    CAPTIONS,
    QUESTIONS,
    Budget,
    align_projector,
    new_language_model,
    padded_pictures,
    train_captions,
    train_questions,
)
from train_tower import TowerSettings, train_tower
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer
from views import Views, build_views

from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor

TRAIN_SCENES, HELD_OUT_SCENES = 5000, 320
CROWDED_SCENES, CROWDED_HELD_OUT = 2500, 96
TILED_SCENES, TILED_HELD_OUT = 600, 32
TOWER = TowerSettings()
JOINT = JointSettings()
TILED_QUESTIONS = replace(
    QUESTIONS,
    steps=500,
    muon_rate=1e-3,
    adam_rate=7e-4,
    first=0,
    save_every=50,
    budgets=(
        Budget(16, 0.25, 14, 6),
        Budget(32, 0.25, 10, 8),
        Budget(64, 0.20, 6, 8),
        Budget(128, 0.15, 4, 10),
        Budget(None, 0.15, 2, 10),
    ),
)


def keep_freed_memory() -> None:
    """Ask glibc not to return large blocks after every step: a third of the time went into page faults."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def train_tokenizers(work: Path) -> tuple[Path, Path]:
    """(``tokenizer.model``, CLIP tokenizer folder), made once."""
    llama, clip = work / "tokenizers" / "tokenizer.model", work / "tokenizers" / "clip"
    if not (llama.exists() and (clip / "tokenizer_config.json").exists()):
        lines = corpus()
        train_clip_tokenizer(lines, clip)
        train_llama_tokenizer(lines, llama)
    return llama, clip


def build_sets(work: Path) -> tuple[list[Views], list[Views]]:
    """Views to train on and held-out ones: of ordinary scenes, then of crowded ones."""
    train = [build_views(work, "train", TRAIN_SCENES), build_views(work, "train", CROWDED_SCENES, crowded=True)]
    held_out = [build_views(work, "val", HELD_OUT_SCENES), build_views(work, "val", CROWDED_HELD_OUT, crowded=True)]
    return train, held_out


def relate_to_text(work: Path, clip: CLIPModel, train: list[Views], held_out: list[Views], tokenizer: Path) -> None:
    """Give ``clip`` its joint side: stage 2, on ordinary and crowded scenes."""
    names = (("train", "crowded-train"), ("val", "crowded-val"))
    seen = [
        [seen_views(work, name, clip, views) for name, views in zip(some, sets, strict=True)]
        for some, sets in zip(names, (train, held_out), strict=True)
    ]
    train_joint(work, clip, *seen, tokenizer, JOINT)


def retrain_joint_side(work: Path, out: Path) -> None:
    """Stage 2 alone, on the tower of the checkpoints in ``out``; everything that LLaVA reads stays as it is there."""
    folder = out / CLIP_NAME
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    relate_to_text(work, clip, *build_sets(work), folder)
    save_clip(clip, CLIPTokenizer.from_pretrained(folder), folder)
    replace_tower(clip, out / "llava-toy-v1.6")
    shutil.copy(work / "joint.csv", out / "training-joint.csv")
    plot_log(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("playground/toy"), help="where checkpoints and logs go")
    parser.add_argument("--work", type=Path, default=Path("playground/toy/.work"), help="states and drawn scenes")
    parser.add_argument("--joint-only", action="store_true", help="train again what relates CLIP's tower to text")
    args = parser.parse_args()
    keep_freed_memory()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.joint_only:
        retrain_joint_side(args.work, args.out)
        return

    llama_tokenizer, clip_tokenizer = train_tokenizers(args.work)
    views, held_out = build_sets(args.work)
    tower = train_tower(args.work, views, held_out, clip_tokenizer, TOWER)
    clip = tower.clip
    relate_to_text(args.work, clip, views, held_out, clip_tokenizer)
    save_clip(clip, CLIPTokenizer.from_pretrained(clip_tokenizer), args.out / CLIP_NAME)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(clip_tokenizer / name, args.out / CLIP_NAME / name)

    save_llama_tokenizer(llama_tokenizer, args.work / "tokenizers" / "llama")
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizers" / "llama")
    pictures = [padded_pictures(args.work, name, clip, sets) for name, sets in (("train", views), ("val", held_out))]
    config = llava_config(len(tokenizer), anyres=False)
    model = new_language_model(config, seed=CAPTIONS.seed)
    if not (args.work / "captions.pt").exists():
        align_projector(model, tokenizer, pictures[0])
    train_captions(args.work, model, tokenizer, pictures[0], CAPTIONS)
    train_questions(args.work, "llava-toy-v1.5", model, tokenizer, *pictures, QUESTIONS)
    save_llava(model, config, llama_tokenizer, args.out / "llava-toy-v1.5")

    processor = CLIPImageProcessor.from_pretrained(args.out / CLIP_NAME)
    sets = (("train", TILED_SCENES), ("val", TILED_HELD_OUT))
    pictures = [tiled_pictures(args.work, split, number, clip, processor) for split, number in sets]
    config = llava_config(len(tokenizer), anyres=True)
    tiled = new_language_model(config, seed=TILED_QUESTIONS.seed)
    tiled.load_state_dict(model.state_dict(), strict=False)
    train_questions(args.work, "llava-toy-v1.6", tiled, tokenizer, *pictures, TILED_QUESTIONS)
    save_llava(tiled, config, llama_tokenizer, args.out / "llava-toy-v1.6", tower=clip)

    for name in ("tower", "joint", "captions", "llava-toy-v1.5", "llava-toy-v1.6"):
        shutil.copy(args.work / f"{name}.csv", args.out / f"training-{name}.csv")
    plot_log(args.out)


if __name__ == "__main__":
    main()
