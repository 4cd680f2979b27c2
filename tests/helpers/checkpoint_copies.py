"""Writable copies of golden checkpoints, and changes to their files."""

import json
import shutil

from llava.model.builder import load_pretrained_model
from records import GOLDEN, golden_checkpoint

CHECKPOINTS = GOLDEN / "checkpoints"
CLIP = "openai/clip-vit-large-patch14-336"


def copy_checkpoint(name, place, called=None):
    """A copy in the folder ``place``, with CLIP where its relative name points."""
    shutil.copytree(CHECKPOINTS / CLIP, place / CLIP, dirs_exist_ok=True)
    return shutil.copytree(golden_checkpoint(name), place / (called or name))


def edit(folder, file="config.json", **values):
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | values))


def load_cpu(folder, **options):
    return load_pretrained_model(str(folder), device="cpu", **options)
