"""What a model's own code makes of a prompt with pictures, up to the door of its language model.

One pass of the base model that ends where it calls its language model: the model itself runs its vision tower and
projector, packs tiles, puts features in place of placeholders and counts (m)RoPE positions; no layer of the language
model runs, and nothing is made up for it. Gradients follow where they are wanted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llava.integrations.transformers.host import Host, UnsupportedModelError, deep_features
from llava.integrations.transformers.replacing import replaced
from llava.integrations.transformers.visual_memory import Observed, VisualMemory


class _AtTheDoor(Exception):
    """Ends the base model's pass: its language model was called."""


@dataclass
class Packing:
    """How the model turned the tiles of each image into one sequence: its own packing, ready to run on other values.

    Args:
        pack: the model's ``pack_image_features``.
        arguments: what it was called with.
        tiles: (V, n) of each image before packing.
    """

    pack: Callable[..., Any]
    arguments: dict[str, Any]
    tiles: list[tuple[int, int]]

    def replay(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Pack other values (V, n, e), one tensor per image, as the features were: (t, e) each, zeros at newlines."""
        newline = values[0].new_zeros(values[0].shape[-1])
        return list(self.pack(**{**self.arguments, "image_features": list(values), "image_newline": newline})[0])


@dataclass
class Capture:
    """A prompt at the door of the language model.

    Args:
        inputs_embeds: (B, L, d) text embeddings with visual features among them.
        position_ids: (B or 1, L), (3, B, L) for mRoPE, or ``None`` if the language model is left to count.
        visual_mask, deepstack: Qwen3-VL's (B, L) bool, and features (visual tokens, d) for its first layers.
        features: what ``get_image_features`` and ``get_video_features`` returned, by modality: a tensor (N, n, d), or
            one tensor per image.
        projector_inputs: what entered the projector, in the order of its calls; only if it was asked for.
        packing: how tiles were packed, for models that pack.
        watched: what entered a layer of the tower and what left it; only if it was asked for.
        arguments: what the base model was called with.
    """

    inputs_embeds: Tensor
    position_ids: Tensor | None
    visual_mask: Tensor | None
    deepstack: list[Tensor] | None
    features: dict[str, Tensor | Sequence[Tensor]]
    arguments: dict[str, Any]
    projector_inputs: list[Tensor] = field(default_factory=list)
    packing: Packing | None = None
    watched: tuple[Tensor, Tensor] | None = None


def capture_prompt(
    host: Host,
    arguments: dict[str, Any],
    observe_projector: bool = False,
    watched_layer: nn.Module | None = None,
    memory: VisualMemory | None = None,
) -> Capture:
    """Run the base model on a prompt, all but the language model.

    Gradients are kept where torch keeps them: `torch.is_grad_enabled`.

    Args:
        arguments: of the base model's ``forward``.
        observe_projector: record what enters ``multi_modal_projector``.
        watched_layer: record what enters and leaves this layer of the vision tower.
        memory: of the last pictures; where these are the same, and what is to be recorded was, the tower does not run.
    """
    at_the_door: dict[str, Any] = {}
    features: dict[str, Any] = {}
    packings: list[Packing] = []
    projector_inputs: list[Tensor] = []
    projected: list[Any] = []
    watched: list[tuple[Tensor, Tensor]] = []

    def stop(*_: Any, **received: Any) -> None:
        if received.get("inputs_embeds") is None:
            raise UnsupportedModelError(host.model, "its language model is not called with inputs_embeds=")
        beyond = deep_features(name for name, value in received.items() if value is not None)
        if beyond:
            raise UnsupportedModelError(
                host.model, f"its language model gets {', '.join(beyond)} beside the embeddings"
            )
        at_the_door.update(received)
        raise _AtTheDoor

    def remember(modality: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*positional: Any, **named: Any) -> Any:
            before = dict(features)
            output = compute(*positional, **named)
            # Qwen3-VL computes videos as images: then the outer call, which ends last, is the one that counts.
            features.update(before)
            features[modality] = features_in(output)
            return output

        return spy

    def remember_packing(pack: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*positional: Any, **named: Any) -> Any:
            bound = inspect.signature(pack).bind(*positional, **named).arguments
            packings.append(Packing(pack, bound, [tuple(image.shape[:2]) for image in bound["image_features"]]))
            return pack(*positional, **named)

        return spy

    def remember_input(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
        projector_inputs.append(positional[0])

    def remember_output(_: nn.Module, __: tuple, output: Any) -> None:
        projected.append(output)

    base, reuse = host.base, False
    if memory is not None and memory.observed is not None and memory.observed.covers(observe_projector, watched_layer):
        reuse = memory.holds(host, arguments)
    with ExitStack() as stack:
        if memory is not None:
            stack.enter_context(memory.at_work(host, arguments, reuse))
        stack.enter_context(replaced(host.language_model, "forward", stop))
        for modality in ("image", "video"):
            name = f"get_{modality}_features"
            if hasattr(base, name):
                stack.enter_context(replaced(base, name, remember(modality, getattr(base, name))))
        if hasattr(base, "pack_image_features"):
            stack.enter_context(replaced(base, "pack_image_features", remember_packing(base.pack_image_features)))
        if observe_projector and hasattr(base, "multi_modal_projector"):
            stack.callback(base.multi_modal_projector.register_forward_pre_hook(remember_input).remove)
        if base is host.model and hasattr(base, "multi_modal_projector"):
            stack.callback(base.multi_modal_projector.register_forward_hook(remember_output).remove)
        if watched_layer is not None:
            stack.callback(watch(watched_layer, watched).remove)
        stack.enter_context(suppress(_AtTheDoor))
        # A base that is the model itself has the pruner's own hooks, which are not for this pass.
        (base.forward if base is host.model else base)(**arguments)
    if "image" in features and projected:
        features["image"] = behind_the_projector(features["image"], projected[-1], at_the_door["inputs_embeds"])
    shown = host.modalities(arguments)
    elsewhere = sorted(shown - features.keys())
    if elsewhere:
        raise UnsupportedModelError(
            host.model, f"it computes {elsewhere[0]} features elsewhere than in get_{elsewhere[0]}_features()"
        )
    packing, left = packings[-1] if packings else None, watched[-1] if watched else None
    if reuse:
        packing = packing or memory.observed.packing
        projector_inputs, left = memory.observed.projector_inputs, memory.observed.layer_states
    elif memory is not None:
        memory.observed = Observed(observe_projector, watched_layer, projector_inputs, left, packing)
    return Capture(
        inputs_embeds=at_the_door["inputs_embeds"],
        position_ids=at_the_door.get("position_ids"),
        visual_mask=at_the_door.get("visual_pos_masks"),
        deepstack=at_the_door.get("deepstack_visual_embeds"),
        features={modality: value for modality, value in features.items() if modality in shown},
        arguments=arguments,
        projector_inputs=projector_inputs,
        packing=packing,
        watched=left,
    )


def features_in(output: Any) -> Any:
    """The features in what ``get_image_features`` returned: pooled where the class pools, else the last states."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state if pooled is None else pooled


def behind_the_projector(features: Any, projected: Any, inputs_embeds: Tensor) -> Any:
    """Features (N, n, e) as the language model reads them (N, n, d), where a class projects them only in `forward`."""
    if not isinstance(features, Tensor) or features.shape[-1] == inputs_embeds.shape[-1]:
        return features
    return projected.reshape(*features.shape[:-1], -1)


def watch(layer: nn.Module, seen: list[tuple[Tensor, Tensor]]) -> Any:
    """Hook that writes down what enters a layer and what leaves it."""

    def remember(_: nn.Module, positional: tuple, named: dict[str, Any], output: Any) -> None:
        entered = positional[0] if positional else named["hidden_states"]
        seen.append((entered, output if isinstance(output, Tensor) else output[0]))

    return layer.register_forward_hook(remember, with_kwargs=True)
