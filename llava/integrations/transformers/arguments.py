"""The arguments of a call: what of them can be pruned, and what they become for a shortened prompt."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.transformers.host import TOKEN_TYPES, Host
from llava.integrations.transformers.shortening import IGNORE_INDEX, Shortening


def by_name(function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, among them those that ``function`` gathers under a name of its own."""
    signature = inspect.signature(function)
    arguments = dict(signature.bind_partial(*positional, **named).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return arguments


def of_shorter_prompt(host: Host, arguments: dict[str, Any], shortening: Shortening) -> dict[str, Any]:
    """The arguments of the model's own call: everything about tokens shorter, nothing about pictures."""
    visual = host.visual_inputs(arguments)
    shorter = {name: value for name, value in arguments.items() if name not in visual and name != "position_ids"}
    shorter["input_ids"] = shortening.tokens(arguments["input_ids"])
    shorter["attention_mask"] = shortening.tokens(arguments["attention_mask"], padding=0)
    for name in TOKEN_TYPES:
        if arguments.get(name) is not None:
            shorter[name] = shortening.tokens(arguments[name], padding=0)
    if arguments.get("labels") is not None:
        shorter["labels"] = shortening.tokens(arguments["labels"], padding=IGNORE_INDEX)
    return shorter


def checked_prompt(arguments: dict[str, Any]) -> Tensor:
    """The ids (B, L) of a call that shows pictures. Raises ValueError for what cannot be pruned."""
    if arguments.get("mm_encoder_outputs"):
        raise ValueError("mm_encoder_outputs holds features that are computed already: give pixel_values instead")
    if arguments.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds with pictures: the prompt's placeholders cannot be found in embeddings; give input_ids"
        )
    prompt = arguments.get("input_ids")
    if prompt is None:
        raise ValueError("a call with pictures needs input_ids, (B, L) with placeholder tokens")
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != prompt.shape):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be (B, L) = {tuple(prompt.shape)} like input_ids, got {shape}")
    cache = arguments.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError(
            "past_key_values is not empty: pictures can be pruned in a first turn only. Give the whole "
            "conversation without the cache"
        )
    return prompt


def check_cache(arguments: dict[str, Any]) -> None:
    """Refuse to continue a cache whose prompt was pruned: where its tokens stood is not known any more."""
    cache = arguments.get("past_key_values")
    if getattr(cache, "prompt_was_pruned", False) and int(cache.get_seq_length()) > 0:
        raise ValueError(
            "past_key_values holds a prompt that was pruned, and cannot be continued: give the whole "
            "conversation, its pictures too, without the cache"
        )


def mark_pruned(cache: Any) -> None:
    """Let `check_cache` know a cache again."""
    if cache is not None:
        cache.prompt_was_pruned = True


def mask_of_padding(host: Host, prompt: Tensor, config: Any) -> Tensor:
    """The mask that `generate` infers when none is given: 0 at padding tokens, unless these also end answers."""
    config = host.model.generation_config if config is None else config
    padding, ends = config.pad_token_id, config.eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    if padding is None or padding in ends:
        return torch.ones_like(prompt)
    return prompt.ne(padding).long()


def lower_lengths(host: Host, arguments: dict[str, Any], dropped: int) -> None:
    """Make limits that count the prompt fit the shorter one, wherever they stand.

    As in the library, arguments of the call come before its ``generation_config``, and that before the model's own;
    limits on new tokens come before those that count the prompt.
    """
    given, own = arguments.get("generation_config"), host.model.generation_config
    if given is not None:
        arguments["generation_config"] = given = copy.deepcopy(given)

    def effective(name: str) -> Any:
        values = (arguments.get(name), getattr(given, name, None), getattr(own, name, None))
        return next((value for value in values if value is not None), None)

    for name, of_new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = effective(name)
        if not limit or effective(of_new) is not None:
            continue
        lower = max(0, limit - dropped)
        if given is not None and arguments.get(name) is None:
            setattr(given, name, lower)
        else:
            arguments[name] = lower


def check_gradients(host: Host, method: Any, arguments: dict[str, Any]) -> None:
    """Raise ValueError if a loss would have to pass through tokens that a method makes.

    Tokens that are kept carry gradients to tower, projector and embeddings; tokens that are made do not.
    """
    model = host.model
    if not method.makes_tokens or not torch.is_grad_enabled():
        return
    if not model.training and arguments.get("labels") is None:
        return
    decoder = {id(parameter) for parameter in host.language_model.parameters()}
    if any(p.requires_grad and id(p) not in decoder for p in host.base.parameters()):
        raise ValueError(
            f"pruner '{method.name}' makes tokens, which give no gradient to the vision tower and the projector: "
            "train with a method that keeps tokens as they are, freeze these parts with requires_grad_(False), or "
            "compute the loss under torch.no_grad()"
        )


def with_whole_prompt(sequences: Tensor, prompt: Tensor, shortened: int) -> Tensor:
    """Put the prompts (B, L) as the user gave them before the new tokens of (B r, ``shortened`` + new) sequences."""
    whole = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0)
    return torch.cat([whole.to(sequences.device), sequences[:, shortened:]], dim=1)


def embedding_device(embedding: nn.Module, otherwise: torch.device) -> torch.device:
    """Where the ids go that an embedding looks up; ``otherwise`` where its table is offloaded."""
    weight = getattr(embedding, "weight", None)
    return otherwise if weight is None or weight.is_meta else weight.device
