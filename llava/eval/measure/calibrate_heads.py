"""Weights of the first attention's heads for a checkpoint, without labels: the ``heads=FILE`` of methods.

Two questions about each of some 50 pictures are enough: a head that looks elsewhere when another question is asked,
and looks somewhere, gets weight (`llava.relevance.heads`). No answer is generated; a picture costs one pass of the
vision tower.

    python -m llava.eval.calibrate_heads --model-path P --pictures FOLDER --questions FILE --out heads.json

``FILE`` holds one question a line, asked in pairs about the pictures in turn; or JSON lines with "image" and "text",
as LLaVA's question files do, of which each picture takes its first two different questions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llava.checkpoint import CheckpointError
from llava.mm_utils import load_image, process_images
from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model, pick_device
from llava.relevance.first_attention import FirstAttention
from llava.relevance.heads import HeadWeights, head_worth
from llava.relevance.language import head_maps
from llava.relevance.question import clean_question

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FEW = 10  # pictures; with fewer, chance decides what a head is worth


@dataclass(frozen=True)
class Case:
    """A picture and two questions about it."""

    picture: Path
    questions: tuple[str, str]


@dataclass(frozen=True)
class Subject:
    """What is calibrated.

    Args:
        model_type: of the decoder.
        attention: its first softmax attention.
        embed_words: a question -> input embeddings (t, d).
        embed_picture: a picture -> tokens (views, n, d) as the decoder receives them, and (views, n) bool, False at
            those that no method may choose.
    """

    model_type: str
    attention: FirstAttention
    embed_words: Callable[[str], Tensor]
    embed_picture: Callable[[Path], tuple[Tensor, Tensor]]


# --- what is asked -------------------------------------------------------------------------------------------------


def find_pictures(source: Path) -> list[Path]:
    """Pictures of a folder by name, or of a list, one path a line. Raises ValueError where there are none."""
    if source.is_dir():
        found = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"--pictures {source} holds no picture ({', '.join(SUFFIXES)})")
        return found
    found = [Path(line) for line in source.read_text("utf-8").splitlines() if line.strip()]
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise ValueError(f"--pictures {source}: {', '.join(missing[:3]) or 'no line'} is no picture")
    return found


def read_cases(pictures: Path, questions: Path, limit: int) -> list[Case]:
    """At most ``limit`` pictures with two questions each. Raises ValueError where questions are too few."""
    found = find_pictures(pictures)
    lines = [line for line in questions.read_text("utf-8").splitlines() if line.strip()]
    if questions.suffix == ".jsonl":
        asked = asked_about(questions, lines)
        cases = [Case(path, asked[path.name]) for path in found if path.name in asked]
        if not cases:
            raise ValueError(f"{questions} has two different questions about no picture of {pictures}")
    else:
        texts = list(dict.fromkeys(filter(None, map(clean_question, lines))))
        if len(texts) < 2:
            raise ValueError(f"{questions} holds {len(texts)} different questions; two or more are needed")
        cases = [
            Case(path, (texts[2 * number % len(texts)], texts[(2 * number + 1) % len(texts)]))
            for number, path in enumerate(found)
        ]
    return cases[:limit]


def asked_about(path: Path, lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """By a picture's name, its first two different questions; pictures with one question are left out."""
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name, text = Path(row["image"]).name, clean_question(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: not JSON with "image" and "text" ({error!r})') from error
        own = texts.setdefault(name, [])
        if text and text not in own:
            own.append(text)
    return {name: (own[0], own[1]) for name, own in texts.items() if len(own) > 1}


# --- models --------------------------------------------------------------------------------------------------------


def read_ours(model_path: str, device: str) -> Subject:
    """A checkpoint in LLaVA's own format."""
    tokenizer, model, processor, _ = load_pretrained_model(model_path, device=device)
    decoder = model.get_model()
    attention = FirstAttention.find(decoder)

    def embed_picture(path: Path) -> tuple[Tensor, Tensor]:
        picture = load_image(path)
        pixels = process_images([picture], processor, model.config)
        encoded = model.encode_pictures(
            [view.to(model.device, model.dtype) for view in pixels], image_sizes=[picture.size]
        )
        return encoded.features, encoded.layouts[0].eligible.to(encoded.features.device)

    return Subject(decoder.config.model_type, attention, _embedder(tokenizer, decoder), embed_picture)


def read_transformers(name: str, device: str) -> Subject:
    """A checkpoint of one of the Transformers library's own classes; all tokens of a picture are one view."""
    from llava.integrations.transformers.capture import capture_prompt
    from llava.integrations.transformers.host import find_host
    from llava.integrations.transformers.loading import load_transformers_model

    processor, model = load_transformers_model(name, device)
    host = find_host(model)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    def embed_picture(path: Path) -> tuple[Tensor, Tensor]:
        inputs: Any = processor(images=[load_image(path)], text=prompt, return_tensors="pt")
        inputs = inputs.to(model.device, dtype=model.dtype)
        embeds = capture_prompt(host, dict(inputs)).inputs_embeds
        tokens = embeds[(inputs["input_ids"] == host.placeholders["image"]).to(embeds.device)][None]
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    decoder = host.language_model
    attention = FirstAttention.find(decoder)
    return Subject(decoder.config.model_type, attention, _embedder(processor.tokenizer, decoder), embed_picture)


def _embedder(tokenizer: Any, decoder: Any) -> Callable[[str], Tensor]:
    table = decoder.get_input_embeddings()

    def embed(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return table(torch.tensor(ids, device=table.weight.device))

    return embed


# --- calibration ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def worth_by_picture(subject: Subject, cases: Sequence[Case]) -> Iterator[Tensor]:
    """What each head is worth on each picture: (heads,) float32, mean over its views with tokens to choose from."""
    attention = subject.attention
    for case in cases:
        tokens, valid = subject.embed_picture(case.picture)
        shown = valid.any(-1)
        tokens, valid = tokens[shown], valid[shown]
        keys = attention.keys(tokens)
        maps = []
        for question in case.questions:
            queries = attention.queries(subject.embed_words(question)[None])
            maps.append(head_maps(queries, keys, attention.scaling, None, valid.to(keys.device)))
        views = [
            head_worth(one[:, own], other[:, own])
            for one, other, own in zip(*maps, valid.to(keys.device), strict=True)
        ]
        yield torch.stack(views).mean(0).float().cpu()


def calibrate(subject: Subject, cases: Sequence[Case], made: str) -> HeadWeights:
    """Mean worth over pictures, scaled to a mean of 1 over heads. Raises ValueError where every head is worth 0."""
    worth = torch.stack(list(tqdm(worth_by_picture(subject, cases), "pictures", len(cases), disable=None))).mean(0)
    if not worth.sum() > 0:
        raise ValueError("no head looks elsewhere when another question is asked: all weights would be 0")
    attention = subject.attention
    return HeadWeights(
        subject.model_type,
        attention.layers,
        attention.layer,
        attention.heads,
        attention.head_dim,
        tuple(round(value, 5) for value in (worth / worth.mean()).tolist()),
        made,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if the file was written, 2 with one line on standard error if it could not be."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.calibrate_heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", default=DEFAULT_CHECKPOINT, help="folder or hub name; default: the toy")
    parser.add_argument("--hf", action="store_true", help="a checkpoint of one of the Transformers library's classes")
    parser.add_argument("--pictures", type=Path, required=True, help="a folder, or a text file with a path a line")
    parser.add_argument("--questions", type=Path, required=True, help="a question a line, or JSON lines (.jsonl)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the weights, JSON")
    parser.add_argument("--limit", type=int, default=50, metavar="K", help="only the first K pictures (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    try:
        if options.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {options.limit}")
        if not options.out.parent.is_dir():
            raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
        cases = read_cases(options.pictures, options.questions, options.limit)
        read = read_transformers if options.hf else read_ours
        subject = read(options.model_path, pick_device(options.device))
        made = f"python -m llava.eval.calibrate_heads on {len(cases)} pictures, two questions each"
        weights = calibrate(subject, cases, made)
        write(options.out, weights.text())
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    if len(cases) < FEW:
        print(f"warning: {len(cases)} pictures are few; about 50 tell heads apart", file=sys.stderr)
    order = sorted(range(weights.heads), key=lambda head: -weights.weights[head])
    best = ", ".join(f"{head} ({weights.weights[head]:.2f})" for head in order[:5])
    print(f"{options.out}: weights of {weights.heads} heads of layer {weights.layer}, mean 1; most: {best}")
    return 0


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
