"""The receiving side of a picture: its pixels come to the engine once, a plan comes with every request.

vLLM's processor caches send what they hold no second time, by a key that is also a picture's place in the encoder
cache and in the prefix cache. Here these are two: in the front end (processing.py) pixels are preprocessed and kept
under the hash of the content, and a request names the digest of its plan, which decides all that comes after. The
plan travels in a field of its own; where it arrives, pixels are looked up by the content that it names. vLLM's caches
stay mirrored as ever: front end and engine see the same contents in the same order.

Imported in every process that vLLM starts, so nothing heavy here.
"""

from __future__ import annotations

import functools
import json
from typing import Any

PLAN_FIELD = "script_plan_"  # and the modality: the field of a picture's item that carries its plan
RECEIVERS = ("LruKeyReplicatedReceiverCache", "ShmObjectStoreReceiverCache")  # of the engine, of the workers


def hook_receivers() -> None:
    """Let vLLM's receiving caches of this process look pixels up by content; doing it again changes nothing."""
    from vllm.multimodal import cache

    for name in RECEIVERS:
        receiver = getattr(cache, name, None)
        receive = getattr(receiver, "get_and_update_features", None)
        if receive is not None and not hasattr(receive, "knows_plans"):  # another vLLM: compatibility.py tells
            receiver.get_and_update_features = knowing_plans(receive)


def knowing_plans(receive: Any) -> Any:
    """A receiver's method that takes items with plans as well."""

    @functools.wraps(receive)
    def received(cache: Any, mm_features: list[Any]) -> list[Any]:
        taken = [take_plan(feature) for feature in mm_features]
        try:
            return receive(cache, mm_features)
        finally:
            for feature, plan in zip(mm_features, taken, strict=True):
                if plan is not None:
                    give_back(feature, *plan)

    received.knows_plans = True
    return received


def take_plan(feature: Any) -> tuple[str, str, Any] | None:
    """Leave of a feature what vLLM caches: pixels or nothing, under the hash of the content.

    Returns the digest that it had, and the plan's field with its name; ``None`` for a feature without a plan.
    """
    name = PLAN_FIELD + feature.modality
    if feature.data is None or name not in feature.data:
        return None
    field, digest = feature.data[name], feature.mm_hash
    others = {key: value for key, value in feature.data.items() if key != name}
    feature.mm_hash = json.loads(field.data.numpy().tobytes())["picture"]  # of a `PicturePlan`
    feature.data = type(feature.data)(others) if others else None
    return digest, name, field


def give_back(feature: Any, digest: str, name: str, field: Any) -> None:
    """Join plan and pixels again; where none were found, the request is refused by vLLM."""
    feature.mm_hash = digest
    if feature.data is not None:
        feature.data = type(feature.data)({**feature.data, name: field})
