"""A pruner at work in a model of the Transformers library: how it attaches, what a call goes through, how it leaves.

    ids with placeholders, pixels -> capture -> select -> shorter ids -> the model's own generate or forward
                                                 kept embeddings -> put in place before the language model

For `generate` the pruned prompt is an ordinary one with fewer placeholders, so that masks, caches and every way of
decoding need no code here. What hangs on the model, and is gone afterwards: the instance's ``generate``, a hook before
and after its ``forward``, a hook before its language model's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llava.decoder.attachment import DecoderPruning
from llava.integrations.transformers.arguments import (
    by_name,
    check_cache,
    checked_prompt,
    lower_lengths,
    mark_pruned,
    mask_of_padding,
    shortened,
    with_whole_prompt,
)
from llava.integrations.transformers.boundary import Plan
from llava.integrations.transformers.capture import ABSENT, Capture, capture_prompt
from llava.integrations.transformers.host import TOKEN_TYPES, Host, find_host
from llava.integrations.transformers.inside_decoder import (
    check_decoder,
    decoder_pruning,
    keep_until_the_decoder,
    with_survivors,
)
from llava.integrations.transformers.pictures import find_pictures
from llava.integrations.transformers.relevance import RelevanceSource
from llava.integrations.transformers.selection import KeptPicture, select_tokens, with_made_tokens
from llava.integrations.transformers.shortening import (
    Shortening,
    counted_positions,
    original_positions,
    packed_positions,
    shorten,
)
from llava.pruning import DecoderPruner, Pruner

Positions = Literal["auto", "packed", "original"]


class AttachedPruner:
    """A pruner that hangs on one model until `remove`; made by `Pruner.attach`.

    One call of the model runs at a time: a second one from another thread is refused.

    Args:
        pruner: the method.
        model: a class of the Transformers library with a head, `generate` on it.
        processor: its processor or tokenizer; reads the question where a method needs it.
        query: the question for all calls; a call's own ``query=`` wins.
        positions: "packed" counts the kept tokens through, "original" leaves them the positions of the whole prompt;
            "auto" takes "original" for models with several position axes (mRoPE) and "packed" for all others.
        clip, siglip: folder or hub name of the CLIP or SigLIP that the model's vision tower comes from; relevance is
            then read in its joint space. Without one it is read in the language model's embedding space.

    Attributes:
        kept: for each image and video of the last call, in the order of the prompts, what was left of it.

    Raises:
        UnsupportedModelError: the model is not built to the pattern (host.py).
        ValueError: the method, the processor or an option does not fit the model.
        RuntimeError: a pruner is attached to this model already.
    """

    def __init__(
        self,
        pruner: Pruner,
        model: nn.Module,
        processor: Any = None,
        *,
        query: str | Sequence[str] | None = None,
        positions: Positions = "auto",
        clip: str | None = None,
        siglip: str | None = None,
    ) -> None:
        if positions not in ("auto", "packed", "original"):
            raise ValueError(f"positions must be auto, packed or original, got {positions!r}")
        self.pruner = pruner
        self.host: Host = find_host(model)
        if pruner.place == "encoder" and positions == "original":
            raise ValueError(f"pruner '{pruner.name}' makes tokens, which have no position in the whole prompt")
        if find_attached(model) is not None:
            raise RuntimeError("a pruner is attached to this model already: remove it first (its handle's remove())")
        self.query = query
        self.positions = positions
        self.relevance = RelevanceSource(self.host, pruner, processor, clip, siglip)
        self.kept: list[KeptPicture] = []
        if isinstance(pruner, DecoderPruner):
            check_decoder(self.host, pruner)
        self._plan: Plan | None = None
        self._in_decoder: DecoderPruning | None = None
        self._attached_to_decoder = ExitStack()
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose call is under way
        self._generating = False
        self._generate_before = model.__dict__.get("generate", ABSENT)
        self._generate = model.generate
        model.generate = self._wrapped_generate()
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
            self.host.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take everything off the model; a second time does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._generate_before is ABSENT:
            del self.host.model.generate
        else:
            self.host.model.generate = self._generate_before

    # --- calls -----------------------------------------------------------------------------------------------------

    def _wrapped_generate(self) -> Callable[..., Any]:
        """`generate` that shortens prompts with pictures; a plain function, as the library looks at its signature."""
        inner = self._generate

        def generate(*positional: Any, **named: Any) -> Any:
            arguments = by_name(inner, positional, named)
            query = arguments.pop("query", None)
            with self._one_call():
                check_cache(arguments)
                if not self.host.shows_pictures(arguments):
                    return inner(**arguments)
                return self._generate_pruned(arguments, query)

        generate.__wrapped__ = inner
        generate.__doc__ = inner.__doc__
        return generate

    def _generate_pruned(self, arguments: dict[str, Any], query: str | Sequence[str] | None) -> Any:
        if arguments.get("inputs") is not None:
            arguments["input_ids"] = arguments["inputs"]
        arguments.pop("inputs", None)
        assistant = arguments.get("assistant_model")
        if assistant is not None and hasattr(getattr(assistant, "model", None), "get_image_features"):
            raise ValueError(
                "the assistant model reads pictures itself, and would get a prompt that is pruned for another model: "
                "use a text-only assistant"
            )
        prompt = checked_prompt(arguments)
        if arguments.get("attention_mask") is None:
            arguments["attention_mask"] = mask_of_padding(self.host, prompt, arguments.get("generation_config"))
        shortening = self._plan_call(arguments, query, generating=True)
        shorter = shortened(self.host, arguments, shortening)
        if self._plan.counts_itself and self._plan.positions.ndim == 3:
            # mRoPE: generate goes on from the last of these, with the plain count of tokens in front of the axes.
            counted = counted_positions(shortening.valid).to(self._plan.positions)
            shorter["position_ids"] = torch.cat([counted[None], self._plan.positions])
        lower_lengths(shorter, prompt.shape[1] - shortening.length)
        output = self._generate(**shorter)
        mark_pruned(arguments.get("past_key_values"))
        if isinstance(output, Tensor):
            return with_whole_prompt(output, prompt, shortening.length)
        mark_pruned(output.get("past_key_values"))
        output.sequences = with_whole_prompt(output.sequences, prompt, shortening.length)
        return output

    def _before_forward(self, model: nn.Module, positional: tuple, named: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._compiled_step() or (self._generating and self._owner == threading.get_ident()):
            return None  # a step of generate
        self._acquire()
        arguments = by_name(type(model).forward, (model, *positional), named)
        del arguments["self"]
        query = arguments.pop("query", None)
        check_cache(arguments)
        if not self.host.shows_pictures(arguments):
            return (), arguments
        prompt = checked_prompt(arguments)
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep as a tensor names positions of the whole prompt: give a number")
        if arguments.get("labels") is not None and isinstance(self.pruner, DecoderPruner):
            raise ValueError(
                f"labels with pruner '{self.pruner.name}': inside the decoder other positions are left than the "
                "labels have. LLaVA's own code (llava.model) computes such losses"
            )
        if arguments.get("attention_mask") is None:
            arguments["attention_mask"] = torch.ones_like(prompt)
        shortening = self._plan_call(arguments, query, generating=False)
        return (), shortened(self.host, arguments, shortening)

    def _after_forward(self, _: nn.Module, __: tuple, output: Any) -> None:
        if self._compiled_step() or self._owner != threading.get_ident() or self._generating:
            return
        if self._plan is not None and output is not None:
            mark_pruned(getattr(output, "past_key_values", None))
        self._release()

    def _before_language_model(self, module: nn.Module, positional: tuple, named: dict[str, Any]) -> Any:
        return None if self._plan is None else self._plan.apply(module, positional, named)

    # --- one call at a time ----------------------------------------------------------------------------------------

    def _compiled_step(self) -> bool:
        """Whether this is a step of `generate` that is being compiled: a look at threads would break its graph."""
        return self._generating and torch.compiler.is_compiling()

    def _acquire(self) -> None:
        if self._owner == threading.get_ident() and not self._generating:
            self._release()  # a forward was interrupted (Ctrl-C): hooks after it do not run then
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "a call of this model is under way in another thread: with a pruner attached, one at a time"
            )
        self._owner = threading.get_ident()

    def _release(self) -> None:
        self._attached_to_decoder.close()
        if self._in_decoder is not None and self._in_decoder.prompt is not None:
            self.kept = with_survivors(self.kept, self._in_decoder)
        self._in_decoder = None
        self._plan = None
        self._owner = None
        self._lock.release()

    @contextmanager
    def _one_call(self) -> Iterator[None]:
        self._acquire()
        self._generating = True
        try:
            yield
        finally:
            self._generating = False
            self._release()

    # --- from a whole prompt to a short one ------------------------------------------------------------------------

    def _plan_call(self, arguments: dict[str, Any], query: str | Sequence[str] | None, generating: bool) -> Shortening:
        """Capture, select and write down what the language model is to get; the index of the shorter prompts."""
        prompt, mask = arguments["input_ids"], arguments["attention_mask"]
        names = {"input_ids", "attention_mask", "position_ids", *TOKEN_TYPES}
        given = {name: value for name, value in arguments.items() if name in names and value is not None}
        given |= self.host.visual_inputs(arguments)
        source = self.relevance
        capture = capture_prompt(self.host, given, source.reads_encoder, source.watched_layer)
        pictures = find_pictures(self.host, capture, prompt)
        question = self.query if query is None else query
        describe = source.describer(capture, pictures, prompt, mask, question)
        inside = isinstance(self.pruner, DecoderPruner)
        if inside:
            self.kept = keep_until_the_decoder(pictures)
        else:
            project = getattr(self.host.base, "multi_modal_projector", None)
            self.kept = select_tokens(self.pruner, pictures, capture.inputs_embeds, describe, project)
        columns = mask.bool().cpu().clone()
        for one in self.kept:
            columns[one.picture.row, one.picture.columns] &= one.kept
        shortening = shorten(columns, pad_left=generating or bool((mask[:, 0] == 0).any()))
        self._plan = self._make_plan(capture, mask, shortening, generating)
        if inside:
            self._in_decoder = decoder_pruning(self.host, self.pruner, pictures, shortening, mask)
            self._attached_to_decoder.enter_context(self._in_decoder.attached())
        return shortening

    def _make_plan(self, capture: Capture, mask: Tensor, shortening: Shortening, generating: bool) -> Plan:
        embeds = with_made_tokens(capture.inputs_embeds, self.kept)
        batch, length = mask.shape
        positions = capture.position_ids
        counted = positions is None
        if counted:
            everything = torch.arange(length, device=mask.device).expand(batch, -1)
            positions = counted_positions(mask) if generating else everything
        if positions.ndim == 3:
            positions = positions[-3:]  # in front of mRoPE's axes the plain count may stand
        positions = positions.expand(*positions.shape[:-2], batch, length)
        several_axes = positions.ndim == 3
        original = self.positions == "original" or (self.positions == "auto" and several_axes)
        dropped = shortening.length < length or bool((shortening.valid.sum(-1) < mask.cpu().sum(-1)).any())
        if original:
            short = original_positions(positions, shortening)
        else:
            short = packed_positions(positions, mask, shortening)
        visual_mask = deepstack = None
        if capture.deepstack is not None:
            device = capture.inputs_embeds.device
            whole_mask = capture.visual_mask.to(device)
            visual_mask = shortening.tokens(whole_mask.long()).bool() & shortening.valid.to(device)
            deepstack = []
            for layer in capture.deepstack:
                dense = layer.new_zeros(batch, length, layer.shape[-1], device=device)
                dense[whole_mask] = layer.to(device)
                deepstack.append(shortening.embeddings(dense))
        return Plan(
            embeds=shortening.embeddings(embeds),
            positions=short,
            gapped=original and dropped,
            counts_itself=several_axes or (counted and not (original and dropped)),
            visual_mask=visual_mask,
            deepstack=deepstack,
        )


def find_attached(model: nn.Module) -> AttachedPruner | None:
    """The pruner that is attached to a model."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, AttachedPruner)), None)
