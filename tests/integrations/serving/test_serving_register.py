"""The plugin's start: found by its entry point, harmless twice, plain about a vLLM that it does not know."""

from importlib.metadata import entry_points

import pytest

pytest.importorskip(
    "vllm", reason="vLLM is not installed: scripts/test_vllm.sh runs these in an environment of its own"
)

from vllm import ModelRegistry
from vllm.multimodal.processing import BaseMultiModalProcessor

from llava.integrations.vllm import ARCHITECTURES, register, registration
from llava.integrations.vllm.compatibility import check_hooks


def test_vllm_finds_the_plugin():
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "script"]
    assert found
    assert found[0].load() is register


def test_registering_twice_changes_nothing_and_hides_nothing():
    stock = set(ModelRegistry.get_supported_archs()) - set(ARCHITECTURES)
    for _ in range(2):
        register()
        assert set(ModelRegistry.get_supported_archs()) == stock | set(ARCHITECTURES)
    assert "LlavaForConditionalGeneration" in stock


def test_an_unknown_vllm_is_told_and_gets_no_architecture(monkeypatch):
    told = []

    class Log:
        def error(self, text, *values):
            told.append(text % values)

    monkeypatch.setattr(registration, "installed_version", lambda: "0.99.0")
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: Log())
    monkeypatch.setattr(ModelRegistry, "register_model", lambda *arguments: pytest.fail("registered"))
    register()
    assert "installed is 0.99.0. The names ScriptLlavaForConditionalGeneration, " in told[0]


def test_a_changed_hook_is_told_before_a_model_is_built():
    check_hooks((BaseMultiModalProcessor, "apply", ("inputs", "timing_ctx")))
    with pytest.raises(RuntimeError, match="apply has parameters inputs, timing_ctx, expected inputs"):
        check_hooks((BaseMultiModalProcessor, "apply", ("inputs",)))
    with pytest.raises(RuntimeError, match="no such method"):
        check_hooks((BaseMultiModalProcessor, "applied", ("inputs",)))
