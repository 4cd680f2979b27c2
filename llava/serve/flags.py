"""The flags that the commands share, defined once: the checkpoint, the method, the machine.

A command puts those it takes into its own parser; what a flag means, and what is refused, is the same everywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from llava.conversation import conv_templates
from llava.model.builder import DEFAULT_CHECKPOINT
from llava.pruning import Method, get_pruner, kernels, list_pruners, parse_budget, parse_options

FULL = "full"  # a budget: nothing is pruned
DEFAULT_METHOD = "script"


def add_checkpoint(parser: Any, default: Any = DEFAULT_CHECKPOINT, help: str | None = None) -> None:
    """``--model-path``; without a default it must be given."""
    given = {"required": True} if default is None else {"default": default}
    text = help or ("folder or hub name" + ("; default: the toy" if default is DEFAULT_CHECKPOINT else ""))
    parser.add_argument("--model-path", help=text, **given)


def add_base(parser: Any) -> None:
    parser.add_argument(
        "--model-base", help="language model that --model-path, a projector alone or a LoRA adapter, belongs to"
    )


def add_template(parser: Any) -> None:
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="template; default: by the model's files")


def add_method(parser: Any, default: str | None = DEFAULT_METHOD) -> None:
    """``--keep-tokens``, ``--pruner`` and ``--pruner-args``, which `make_pruner` reads.

    Args:
        default: of ``--pruner``; ``None`` where a command must know whether one was named.
    """
    parser.add_argument(
        "--keep-tokens",
        default=FULL,
        metavar="N",
        help="visual tokens kept per view or frame: a count, a share, full, or auto (auto:0.9, auto:gain=0.0006, "
        "auto:0.9:floor=8:ceiling=128): as many as it takes; auto:mean_tokens=64:curves=FILE: 64 on average",
    )
    methods = ", ".join(list_pruners())
    parser.add_argument(
        "--pruner", default=default, metavar="NAME", help=f"one of {methods}; default: {DEFAULT_METHOD}"
    )
    parser.add_argument("--pruner-args", nargs="+", default=[], metavar="KEY=VALUE", help="options of the pruner")


def add_image_grid(parser: Any) -> None:
    """``--image-grid``, which `parse_grid` reads."""
    parser.add_argument(
        "--image-grid",
        metavar="WxH",
        help="cut every picture for this resolution, whatever its shape, such as 672x672",
    )


def parse_grid(text: str, name: str = "--image-grid") -> list[int]:
    """Read "672x672" as [width, height] in pixels. Raises ValueError, which calls it ``name``."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width, height = 0, 0
    if min(width, height) < 1:
        raise ValueError(f"{name} is written WIDTHxHEIGHT in pixels, such as 672x672; got {text!r}")
    return [width, height]


def add_device(parser: Any) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_dtype(parser: Any) -> None:
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")


def add_attention(parser: Any) -> None:
    parser.add_argument("--attn-implementation", help="sdpa, eager, flash_attention_2, ...")


def add_kernels(parser: Any) -> None:
    parser.add_argument(
        "--kernels",
        choices=kernels.CHOICES,
        default="auto",
        help="what selects on CUDA: auto (Triton's kernels where they pass a trial), torch, triton (untried)",
    )


def use_kernels(choice: str, device: str) -> None:
    """What ``--kernels`` says. Raises ValueError where the device has no kernels, ImportError without Triton."""
    if choice == "triton" and not device.startswith("cuda"):
        raise ValueError(f"--kernels triton is for CUDA, not for --device {device}")
    kernels.use(choice)


def make_pruner(name: str, keep_tokens: str, options: Sequence[str], seed: int | None = None) -> Method | None:
    """The method asked for; ``None`` for "full", after checking name and options all the same.

    Args:
        seed: of random methods, where the options do not name one.
    """
    keywords = parse_options(name, options)
    pruner = get_pruner(name, **keywords)
    if seed is not None and hasattr(pruner, "seed"):
        keywords.setdefault("seed", seed)
    if keep_tokens == FULL:
        return None
    return get_pruner(name, **{"keep_tokens": parse_budget(keep_tokens), **keywords})


def at_least_one(text: str) -> int:
    """A whole number from 1: what `argparse` calls for counts. Raises ArgumentTypeError."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return number
