"""The two small tokenizers of the toy, in the file formats of the originals.

* Language model: SentencePiece BPE with byte fallback, ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2 (as LLaMA's).
* CLIP: byte-level BPE in ``vocab.json`` and ``merges.txt``. ``<|endoftext|>`` has the largest id, because CLIP's text
  tower with ``eos_token_id`` 2 pools where the largest id stands.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
import sentencepiece
from formats import MAKERS, SYSTEM, as_asked
from questions import LETTERS, draw
from scenes import COLOR_NAMES, TEXTS, THINGS, make_scene, scene_rng

CLIP_MERGES = 700
LLAMA_VOCABULARY = 800
# CLIP's own splitting rule.
_CLIP_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def corpus(scenes: int = 600, per_scene: int = 8) -> list[str]:
    """Prompts and answers of training scenes, and every word the toy can say a few times."""
    lines = []
    for index in range(scenes):
        scene, rng = make_scene("train", index).layout, scene_rng("train", index, 9)
        for _ in range(per_scene):
            question = draw(scene, rng, MAKERS)
            text, suffix = as_asked(question, scene, rng)
            lines += [f"{SYSTEM} USER: ", f"{text}{suffix} ASSISTANT: {question.answer}"]
    words = [*COLOR_NAMES, *THINGS, *TEXTS, *LETTERS, "Yes", "No", "Unanswerable", "left", "right", "above", "below"]
    return lines + [f"{word} {word}" for word in words for _ in range(40)]


def train_llama_tokenizer(lines: list[str], path: Path) -> None:
    """Write ``tokenizer.model``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in lines for line in text.split("\n")),
        model_writer=model,
        vocab_size=LLAMA_VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + k) for k, b in enumerate(rest)}}


def _learn_merges(words: Counter[tuple[str, ...]], number: int) -> list[tuple[str, str]]:
    """Plain byte-pair encoding: the most frequent neighbours first, the smaller pair on ties."""
    merges: list[tuple[str, str]] = []
    while len(merges) < number:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, frequency in words.items():
            for pair in pairwise(word):
                pairs[pair] += frequency
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merge(word, best): frequency for word, frequency in words.items()})
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged, position = [], 0
    while position < len(word):
        if word[position : position + 2] == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return tuple(merged)


def train_clip_tokenizer(lines: list[str], folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and the two small configuration files into ``folder``."""
    characters = _byte_characters()
    words: Counter[tuple[str, ...]] = Counter()
    for line in lines:
        for word in _CLIP_WORDS.findall(line.lower()):
            letters = [characters[byte] for byte in word.encode()]
            words[(*letters[:-1], letters[-1] + "</w>")] += 1
    merges = _learn_merges(words, CLIP_MERGES)
    alphabet = list(characters.values())
    entries = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    entries = list(dict.fromkeys(entries)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    settings = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
