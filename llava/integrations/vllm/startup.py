"""What an operator is told once, when the server starts: what is kept, how questions are read, caches, versions."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from llava.integrations.vllm.options import ServerOptions
from llava.integrations.vllm.registration import TESTED_VERSIONS, installed_version, is_tested
from llava.integrations.vllm.relevance import Reading

PACKAGES = {"script-llava": "Script", "transformers": "Transformers", "torch": "PyTorch"}


def start_line(reading: Reading, server: ServerOptions, pixels_gib: float) -> str:
    """The line of the log: budget, method, source of relevance and why, caches, versions.

    Args:
        pixels_gib: what vLLM's ``--mm-processor-cache-gb`` says.
    """
    options = reading.options
    if options.keep_tokens is not None:
        budget = f"keeps {options.keep_tokens} visual tokens"
    elif options.image_pruning_rate is not None:
        budget = f"removes {options.image_pruning_rate:.0%} of the visual tokens"
    else:
        budget = "keeps all visual tokens unless a request says otherwise"
    if reading.choice is None:
        source = "reads no question"
    elif options.reuse == "picture":
        source = "chooses without the question, for all of them (reuse=picture)"
    else:
        often = " until a picture is asked about often (reuse=auto)" if options.reuse == "auto" else ""
        source = f"reads the question with {reading.choice}{often}"
    return (
        f"Script: pruner '{reading.method.name}' {budget} of each {options.keep_per} and {source}; caches: up to "
        f"{server.feature_cache_mib} MiB of unpruned features in each worker and {pixels_gib:g} GiB of preprocessed "
        f"pictures in vLLM's processor cache; versions: {told_versions(versions())}"
    )


def versions() -> dict[str, str]:
    """Versions of what decides which tokens are kept, by the name that people know."""
    found = {"vLLM": installed_version()}
    for package, name in PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a folder that is not installed
            found[name] = "not installed"
    return found


def told_versions(found: Mapping[str, str]) -> str:
    """The versions in words, and whether this vLLM is one that the plugin was tested with."""
    words = ", ".join(f"{name} {version}" for name, version in found.items())
    if is_tested(found["vLLM"]):
        return words
    return f"{words} (this vLLM was not tested, {' and '.join(TESTED_VERSIONS)} were)"
