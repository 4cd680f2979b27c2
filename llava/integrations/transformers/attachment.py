"""A pruner at work in a model of the Transformers library: how it attaches, what a call goes through, how it leaves.

    ids with placeholders, pixels -> capture -> select -> shorter ids -> the model's own generate or forward
                                                 kept embeddings -> put in place before the language model

For `generate` the pruned prompt is an ordinary one with fewer placeholders, so that masks, caches and every way of
decoding need no code here. What hangs on the model, and is gone afterwards: the instance's ``generate``, a hook before
and after its ``forward``, a hook before its language model's; and, while `generate` runs, its
``prepare_inputs_for_generation`` and the joining of criteria with a user's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.transformers.arguments import (
    by_name,
    check_cache,
    check_gradients,
    checked_prompt,
    lower_lengths,
    mark_pruned,
    mask_of_padding,
    of_shorter_prompt,
)
from llava.integrations.transformers.boundary import Plan
from llava.integrations.transformers.calls import Call, PrunedGenerate
from llava.integrations.transformers.capture import capture_prompt
from llava.integrations.transformers.compiled import SetAside, original, refuse_to_be_compiled
from llava.integrations.transformers.host import TOKEN_TYPES, Host, find_host
from llava.integrations.transformers.inside_decoder import (
    all_that_is_read,
    check_decoder,
    decoder_pruning,
    kept_at_the_end,
    target_of,
)
from llava.integrations.transformers.pictures import find_pictures
from llava.integrations.transformers.relevance import HostRelevance
from llava.integrations.transformers.replacing import Absent, replaced
from llava.integrations.transformers.selection import KeptPicture, select_tokens
from llava.integrations.transformers.short_prompt import Positions, dropped_columns, plan_short_prompt
from llava.integrations.transformers.shortening import Shortening, counted_positions, shorten
from llava.integrations.transformers.visual_memory import VisualMemory
from llava.integrations.transformers.whole_prompt import WholePrompt, WholePromptStreamer
from llava.pruning import DecoderPruner, Method
from llava.pruning.functional import without_autocast
from llava.relevance.policy import Choice


def attach(method: Method, model: nn.Module, processor: Any = None, **options: Any) -> AttachedPruner:
    """Prune with ``method`` in every call of a model of the library until the handle's ``remove()``.

    Args:
        options: ``query``, ``positions``, ``clip``, ``siglip``, ``keep_features``, ``memory``; arguments and errors as
            of `AttachedPruner`.
    """
    return AttachedPruner(method, model, processor, **options)


class AttachedPruner:
    """A pruner that hangs on one model until `remove`; made by `Method.attach`.

    Calls come from one thread at a time: a second one meanwhile is refused.

    Args:
        method: what chooses.
        model: a class of the Transformers library with a head, `generate` on it.
        processor: its processor or tokenizer; reads the question where a method needs it.
        query: the question for all calls; a call's own ``query=`` wins.
        positions: "packed" counts the kept tokens through, "original" leaves them the positions of the whole prompt;
            "auto" takes "original" for models with several position axes (mRoPE) and "packed" for all others.
        clip, siglip: folder or hub name of the CLIP or SigLIP that the model's vision tower comes from, for relevance
            in its joint space. A tower that is known by its shape needs none where that model's files are at hand.
        keep_features: whether `kept` holds the features of all tokens, for those who compare them afterwards.
        memory: of the pictures asked about before: where a call brings the same ones, the tower does not run again.

    Attributes:
        kept: for each image and video of the last call, in the order of the prompts, what was kept of it.
        relevance: where the question is read, and why; ``None`` for a method that reads none.

    Raises:
        UnsupportedModelError: the model is not built to the pattern (host.py).
        ValueError: the method, the processor or an option does not fit the model.
        RuntimeError: a pruner is attached to this model already.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        processor: Any = None,
        *,
        query: str | Sequence[str] | None = None,
        positions: Positions = "auto",
        clip: str | None = None,
        siglip: str | None = None,
        keep_features: bool = False,
        memory: VisualMemory | None = None,
    ) -> None:
        if positions not in ("auto", "packed", "original"):
            raise ValueError(f"positions must be auto, packed or original, got {positions!r}")
        self.method = method
        self.host: Host = find_host(model)
        if method.makes_tokens and positions == "original":
            raise ValueError(f"pruner '{method.name}' makes tokens, which have no position in the whole prompt")
        if method.makes_tokens and not method.makes_means and self.host.deep:
            raise ValueError(
                f"pruner '{method.name}' makes tokens, and {type(model).__name__} reads features of each visual token "
                "in the first layers of its language model, too, which such a token does not have: take a method that "
                "keeps tokens as they are, or one whose tokens are means of others (pool, restore)"
            )
        if find_attached(model) is not None:
            raise RuntimeError("a pruner is attached to this model already: remove it first (its handle's remove())")
        self.query = query
        self.positions = positions
        self.keep_features, self.memory = keep_features, memory
        inside = isinstance(method, DecoderPruner)
        if inside:
            check_decoder(self.host, method)
        self._reader = HostRelevance(self.host, method, processor, clip, siglip)
        self.relevance: Choice | None = self._reader.choice
        self.kept: list[KeptPicture] = []
        self._calls: list[Call] = []
        self._plan: Plan | None = None  # of the innermost call
        self._generating = False  # whether that is one of generate
        self._owner: int | None = None  # the thread whose calls these are
        self._lock = threading.Lock()
        self._hang(list(self.host.language_model.layers) if inside else [])

    def _hang(self, layers: Sequence[nn.Module]) -> None:
        model, language_model = self.host.model, self.host.language_model
        watched = [self._reader.watched_layer] if self._reader.watched_layer is not None else []
        if self._reader.reads_encoder:
            watched.append(self.host.base.multi_modal_projector)
        self._compiled = SetAside(model, [model, self.host.base, language_model, *watched, *layers])
        self._generate_before = model.__dict__.get("generate", Absent)
        self._generate = original(model.generate)
        model.generate = PrunedGenerate(self)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
            language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take everything off the model; a second time does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._generate_before is Absent:
            del self.host.model.generate
        else:
            self.host.model.generate = self._generate_before
        self._compiled.restore()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedPruner:
        """A copy of the model takes a pruner of its own along; it is what `find_attached` finds there."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        alone = {"_lock": threading.Lock(), "_calls": [], "_plan": None, "_generating": False, "_owner": None}
        alone |= {"kept": list(self.kept), "method": self.method}
        for name, value in self.__dict__.items():
            twin.__dict__[name] = alone[name] if name in alone else copy.deepcopy(value, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a model cannot be pickled while pruner '{self.method.name}' is attached: remove it first, or save the "
            "model with save_pretrained"
        )

    # --- calls -----------------------------------------------------------------------------------------------------

    def generate(self, *positional: Any, **named: Any) -> Any:
        """The model's `generate` with prompts shortened that show pictures; takes ``query=`` beside its arguments."""
        arguments = by_name(self._generate, positional, named)
        query = arguments.pop("query", None)
        self._compiled.check()
        with self._one_call() as call:
            check_cache(arguments)
            with replaced(self.host.model, "prepare_inputs_for_generation", self._announcing(call)):
                if not self.host.shows_pictures(arguments):
                    return self._generate(**arguments)
                with torch.no_grad():
                    return self._generate_pruned(call, arguments, query)

    def _generate_pruned(self, call: Call, arguments: dict[str, Any], query: str | Sequence[str] | None) -> Any:
        if arguments.get("inputs") is not None:
            arguments["input_ids"] = arguments["inputs"]
        arguments.pop("inputs", None)
        assistant = arguments.get("assistant_model")
        if assistant is not None and hasattr(getattr(assistant, "model", None), "get_image_features"):
            raise ValueError(
                "the assistant model reads pictures itself, and would get a prompt that is pruned for another model: "
                "use a text-only assistant"
            )
        call.loop = arguments.get("custom_generate") is not None
        prompt = checked_prompt(arguments)
        if arguments.get("attention_mask") is None:
            arguments["attention_mask"] = mask_of_padding(self.host, prompt, arguments.get("generation_config"))
        shortening = self._plan_call(call, arguments, query)
        shorter = of_shorter_prompt(self.host, arguments, shortening)
        if call.plan.counts_itself and call.plan.positions.ndim == 3:
            # mRoPE: generate continues from the last of these, with the plain count of tokens in front of the axes.
            counted = counted_positions(shortening.valid).to(call.plan.positions)
            shorter["position_ids"] = torch.cat([counted[None], call.plan.positions])
        lower_lengths(self.host, shorter, prompt.shape[1] - shortening.length)
        whole = WholePrompt(prompt, shortening.length)
        if shorter.get("prefix_allowed_tokens_fn") is not None:
            shorter["prefix_allowed_tokens_fn"] = whole.prefix_function(shorter["prefix_allowed_tokens_fn"])
        if shorter.get("streamer") is not None:
            shorter["streamer"] = WholePromptStreamer(shorter["streamer"], prompt)
        merge = self.host.model._merge_criteria_processor_list
        with replaced(self.host.model, "_merge_criteria_processor_list", whole.merge(merge)):
            output = self._generate(**shorter)
        mark_pruned(arguments.get("past_key_values"))
        if isinstance(output, Tensor):
            return whole.sequences(output)
        mark_pruned(output.get("past_key_values"))
        output.sequences = whole.sequences(output.sequences)
        return output

    def _announcing(self, call: Call) -> Callable[..., Any]:
        """The model's ``prepare_inputs_for_generation``, which `generate` calls before each of its steps.

        A forward with other inputs than it gave (classifier-free guidance, a logits processor that asks the model) is
        no step, and is a call of its own.
        """
        inner = self.host.model.prepare_inputs_for_generation

        def prepare(*positional: Any, **named: Any) -> dict[str, Any]:
            inputs = inner(*positional, **named)
            call.step = inputs.get("input_ids")
            return inputs

        prepare.__wrapped__ = inner
        return prepare

    def _before_forward(self, model: nn.Module, positional: tuple, named: dict[str, Any]) -> tuple[tuple, dict] | None:
        if torch.compiler.is_compiling():
            if not self._generating:
                refuse_to_be_compiled()
            return None  # a step of generate that is being compiled: a look at threads would break its graph
        self._drop_interrupted()
        if self._is_step(positional, named):
            return None
        self._compiled.check()
        call = self._begin(Call(generating=False))
        arguments = by_name(type(model).forward, (model, *positional), named)
        del arguments["self"]
        query = arguments.pop("query", None)
        check_cache(arguments)
        if not self.host.shows_pictures(arguments):
            self._check_loop(arguments.get("input_ids"))
            return (), arguments
        prompt = checked_prompt(arguments)
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep as a tensor names positions of the whole prompt: give a number")
        if arguments.get("labels") is not None and isinstance(self.method, DecoderPruner):
            raise ValueError(
                f"labels with pruner '{self.method.name}': inside the decoder there are fewer positions at the end "
                "than the labels have. LLaVA's own code (llava.model) computes such losses"
            )
        check_gradients(self.host, self.method, arguments)
        if arguments.get("attention_mask") is None:
            arguments["attention_mask"] = torch.ones_like(prompt)
        shortening = self._plan_call(call, arguments, query)
        return (), of_shorter_prompt(self.host, arguments, shortening)

    def _after_forward(self, _: nn.Module, __: tuple, output: Any) -> None:
        if torch.compiler.is_compiling() or self._generating or self._owner != threading.get_ident():
            return
        if self._plan is not None and output is not None:
            mark_pruned(getattr(output, "past_key_values", None))
        self._end()

    def _before_language_model(self, module: nn.Module, positional: tuple, named: dict[str, Any]) -> Any:
        return None if self._plan is None else self._plan.apply(module, positional, named)

    def _is_step(self, positional: tuple, named: dict[str, Any]) -> bool:
        """Whether a forward is a step of the `generate` under way."""
        if not self._generating or self._owner != threading.get_ident():
            return False
        given = named.get("input_ids", positional[0] if positional else None)
        return given is not None and given is self._calls[-1].step

    def _check_loop(self, input_ids: Tensor | None) -> None:
        """Raise ValueError for a step of a user's own loop that was not made as `generate` makes its steps."""
        around = self._calls[-2] if len(self._calls) > 1 else None
        if around is None or not around.loop or input_ids is None:
            return
        marks = torch.tensor(list(self.host.placeholders.values()), device=input_ids.device)
        if bool(torch.isin(input_ids, marks).any()):
            raise ValueError(
                "custom_generate gives the model a prompt with placeholders that prepare_inputs_for_generation did "
                "not make: a pruner knows the steps of generate by that; let the loop call it before each step"
            )

    # --- calls within calls, and one thread at a time --------------------------------------------------------------

    def _begin(self, call: Call) -> Call:
        """Make a call the innermost one. Raises RuntimeError while another thread has one."""
        me = threading.get_ident()
        with self._lock:
            if self._owner not in (None, me):
                raise RuntimeError(
                    "a call of this model is under way in another thread: with a pruner attached, one at a time"
                )
            self._owner = me
        if self._calls:
            self._calls[-1].suspend()
        self._calls.append(call)
        self._look_at_innermost()
        return call

    def _end(self) -> None:
        """The innermost call has ended."""
        call = self._calls.pop()
        call.suspend()
        if not self._calls and call.in_decoder is not None and call.in_decoder.prompt is not None:
            self.kept = kept_at_the_end(self.kept, call.in_decoder)
        self._look_at_innermost()
        if self._calls:
            self._calls[-1].resume()
        else:
            self._owner = None

    def _look_at_innermost(self) -> None:
        self._plan = self._calls[-1].plan if self._calls else None
        self._generating = bool(self._calls) and self._calls[-1].generating

    def _drop_interrupted(self) -> None:
        """End forwards of this thread that were interrupted (Ctrl-C): hooks after them do not run then."""
        while self._owner == threading.get_ident() and not self._generating:
            self._end()

    @contextmanager
    def _one_call(self) -> Iterator[Call]:
        """A call of `generate`."""
        self._drop_interrupted()
        depth = len(self._calls)
        call = self._begin(Call(generating=True))
        try:
            yield call
        finally:
            while len(self._calls) > depth:
                self._end()

    # --- from a whole prompt to a short one ------------------------------------------------------------------------

    def _plan_call(self, call: Call, arguments: dict[str, Any], query: str | Sequence[str] | None) -> Shortening:
        """Capture, select and write down what the language model is to get; the index of the shorter prompts."""
        prompt, mask = arguments["input_ids"], arguments["attention_mask"]
        reader, method = self._reader, self._reader.method
        with without_autocast():
            asked, question_of_row = reader.ask(prompt, mask, self.query if query is None else query)
        names = {"input_ids", "attention_mask", "position_ids", *TOKEN_TYPES}
        given = {name: value for name, value in arguments.items() if name in names and value is not None}
        given |= self.host.visual_inputs(arguments)
        capture = capture_prompt(self.host, given, reader.reads_encoder, reader.watched_layer, self.memory)
        pictures = find_pictures(self.host, capture, prompt, mask)
        inside = isinstance(method, DecoderPruner)
        if inside:
            kept = all_that_is_read(pictures)
        else:
            embeds = capture.inputs_embeds.detach()
            project = getattr(self.host.base, "multi_modal_projector", None)
            with torch.no_grad(), without_autocast():
                describe = reader.describer(capture, pictures, prompt, asked, question_of_row)
                kept = select_tokens(method, pictures, embeds, describe, project, self.keep_features)
        kept = [replace(one, relevance=self.relevance) for one in kept]
        if len(self._calls) == 1:
            self.kept = kept
        cuts = inside and any(target_of(method, picture) < len(picture.columns) for picture in pictures)
        pad_left = call.generating or bool((mask[:, 0] == 0).any())
        shortening = shorten(dropped_columns(kept, mask), mask.cpu(), pad_left, may_stay=not cuts)
        call.plan = plan_short_prompt(capture, mask, shortening, kept, call.generating, self.positions)
        if cuts:
            call.in_decoder = decoder_pruning(self.host, method, pictures, shortening)
            call.resume()
        self._look_at_innermost()
        return shortening


def find_attached(model: nn.Module) -> AttachedPruner | None:
    """The pruner that is attached to a model."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, AttachedPruner)), None)
