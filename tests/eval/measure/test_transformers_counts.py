"""Work and cache of models of the library: formulas by configuration against the classes, counted by torch."""

from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from llava.eval.hosts.tiny import build, small_config
from llava.eval.measure.cost import count_macs, prefill_flops
from llava.eval.measure.decoder_layers import DecoderLayer, decoder_layers
from llava.eval.measure.efficiency import make_rows, measure, summary_of
from llava.eval.measure.efficiency_subject import TEXT_AFTER, TEXT_BEFORE, Row, cache_bytes
from llava.eval.measure.efficiency_transformers import TransformersSubject, build_random_transformers
from llava.eval.measure.transformers_counts import TransformersCounts
from llava.eval.measure.transformers_presets import TRANSFORMERS_PRESETS, gemma4, qwen3_5, qwen3_vl

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older releases lack some of these classes"
)
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # wider together than the model, as in Gemma
    "intermediate_size": 96,
    "vocab_size": 2048,
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_position_embeddings": 64}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
GEMMA = {
    **{"global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 80},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
TINY = {
    "qwen3-vl-8b": partial(qwen3_vl, TEXT, VISION | {"deepstack_visual_indexes": [0, 1]}, side=16),
    "qwen3.5-9b": partial(qwen3_5, TEXT | LINEAR, VISION, side=16),
    "gemma4-12b": partial(gemma4, TEXT | GEMMA, {"patch_size": 4, "pooling_kernel_size": 2}, budgets=(20, 40, 70)),
}


def class_counts(model, tokens):
    """Multiply-accumulates and cache of a class's language model, over embeddings of its own device."""
    weight = model.get_input_embeddings().weight
    embeds = torch.zeros(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    cache = []

    def call():
        output = model.model.language_model(inputs_embeds=embeds, use_cache=True)
        cache.append(output.past_key_values)

    return count_macs(call), cache[0] if cache else None


def layer_cache(layers, tokens, value_bytes):
    return sum(layer.held(tokens) * layer.cache_width for layer in layers) * value_bytes


def window_product(layers, tokens):
    """What torch counts beyond the formula: the kernel multiplies with keys outside a window, too."""
    return sum(2 * tokens * (tokens - min(tokens, layer.window or tokens)) * layer.query_width for layer in layers)


def test_equal_layers_are_the_papers_formula():
    layer = DecoderLayer(weights=4 * 64**2 + 3 * 64 * 96, query_width=64, cache_width=128)
    assert 3 * layer.macs(50) == prefill_flops([50] * 3, 64, 96)


@pytest.mark.slow
def test_sizes_are_those_of_the_published_models():
    """Parameters of the presets without storage: 8.77, 9.41 and 11.96 billion."""
    for name, billions in (("qwen3-vl-8b", 8.767), ("qwen3.5-9b", 9.410), ("gemma4-12b", 11.957)):
        with torch.device("meta"):
            model = TRANSFORMERS_PRESETS[name]().make(dtype=torch.bfloat16, attn_implementation=None)
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions


@pytest.mark.parametrize("name", ["qwen3-vl-8b", "gemma4-12b"])
def test_formula_and_class_agree_with_attention_in_all_layers(name):
    """To the last multiply-accumulate; a window reaches fewer keys than the kernel multiplies with."""
    model = build_random_transformers(TINY[name], torch.float32, "meta").model
    layers = decoder_layers(model.config.get_text_config())
    for tokens in (40, 150):  # within Gemma's window of 80, and beyond
        counted, cache = class_counts(model, tokens)
        assert sum(layer.macs(tokens) for layer in layers) == counted - window_product(layers, tokens)
        assert layer_cache(layers, tokens, 4) == cache_bytes(cache)
    assert (window_product(layers, 150) > 0) == (name == "gemma4-12b")


def test_formula_and_class_agree_with_recurrent_layers(monkeypatch):
    """All but the rule itself to the last multiply-accumulate; the state does not grow with the prompt."""
    model = build_random_transformers(TINY["qwen3.5-9b"], torch.float32, "meta").model
    text = model.config.get_text_config()
    layers = decoder_layers(text)
    recurrent = [layer for layer in layers if layer.state_macs]
    assert len(recurrent) == 3
    sizes = []
    from transformers.models.qwen3_5 import modeling_qwen3_5

    rule, works = modeling_qwen3_5.torch_chunk_gated_delta_rule, []

    def noted(*tensors, **options):
        found = []
        works.append(count_macs(lambda: found.append(rule(*tensors, **options))))
        return found[0]

    for name in ("torch_chunk_gated_delta_rule", "chunk_gated_delta_rule"):
        monkeypatch.setattr(modeling_qwen3_5, name, noted, raising=False)
    for module in model.modules():
        if hasattr(module, "chunk_gated_delta_rule"):
            module.chunk_gated_delta_rule = noted
    for tokens in (64, 128):
        works.clear()
        counted, cache = class_counts(model, tokens)
        assert len(works) == 3
        formula = sum(layer.macs(tokens) - tokens * layer.state_macs for layer in layers)
        padding = sum(3 * (2 * 32 + 32) * 4 for _ in recurrent)  # the convolution starts three tokens early
        assert counted - sum(works) - formula in (0, padding)
        sizes.append(cache_bytes(cache) - layer_cache(layers, tokens, 4))
    state = 4 * (4 * 16 * 8 + (2 * 32 + 32) * 4)  # four heads' matrices, and what the convolution looks back on
    assert sizes == [3 * state] * 2


def test_formula_and_class_agree_where_layers_share_keys_and_values():
    """Gemma 4 with an embedding for each layer: later layers keep nothing, and have no key or value matrices."""
    config = small_config("gemma4")
    text = config.text_config.to_dict() | {
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
        **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    }
    text.pop("per_layer_config", None)
    config = type(config)(**config.to_dict() | {"text_config": text})
    model = build(transformers.Gemma4ForConditionalGeneration, config)
    text = model.config.get_text_config()
    layers = decoder_layers(text)
    assert [layer.cache_width > 0 for layer in layers] == [True, True, False, False]
    ids = torch.full((1, 40), 5)
    cache = DynamicCache(config=text)
    counted = count_macs(lambda: model.model.language_model(input_ids=ids, past_key_values=cache, use_cache=True))
    once = 40 * text.hidden_size * text.num_hidden_layers * text.hidden_size_per_layer_input
    formula = sum(layer.macs(40) for layer in layers)
    assert formula + once == counted - window_product(layers, 40)
    assert layer_cache(layers, 40, 4) == cache_bytes(cache)


def test_visual_tokens_that_a_window_still_holds():
    layer = DecoderLayer(weights=1, query_width=1, cache_width=1, window=11)
    assert [layer.held_visual(5, visual, 3) for visual in (2, 7, 20)] == [2, 7, 7]  # three of the ten are text
    assert layer.held_visual(0, 5, 12) == 0
    assert DecoderLayer(weights=1, query_width=1).held(9) == 0


def test_experts_are_refused():
    with pytest.raises(ValueError, match="has experts"):
        decoder_layers(small_config("qwen3_vl_moe").text_config)


@pytest.mark.parametrize("name", TINY)
def test_work_is_the_same_counted_without_doing_it(name):
    """`--counts-only` against a real pass of the limit and the unpruned model, and against a pruned one's tokens."""
    found = {}
    for device in ("meta", "cpu"):
        built = build_random_transformers(TINY[name], torch.float32, device)
        subject = TransformersCounts(built) if device == "meta" else TransformersSubject(built, 1, "cpu")
        rows = make_rows(["divprune", "fastv"], [10], subject.tokens_per_view)
        rows[1:1] = [Row("resized", tokens) for tokens in subject.own_sizes]
        measure(subject, rows, repeats=0, warm_up=0, new_tokens=1)
        found[device] = {(row.name, row.keep): summary_of(row, None, rows[0]) for row in rows}
    for row, real in found["cpu"].items():
        counted = found["meta"][row]
        same = ["visual_tokens", "average_tokens", "formula_macs", "visual_cache_bytes", "cache_bytes"]
        if row[0] == "fastv":
            assert "fastv" in counted["note"]
            assert counted["note"] == real["note"]
            continue
        assert [counted[figure] for figure in same] == [real[figure] for figure in same]
        if row[0] == "limit":
            assert counted["counted_macs"] == real["counted_macs"]
    resized = [counted for (kind, _), counted in found["meta"].items() if kind == "resized"]
    assert [counted["visual_tokens"] for counted in resized] == ([36, 16] if name == "gemma4-12b" else [])
    unpruned = found["meta"]["unpruned", None]
    for counted in resized:  # a smaller picture spares the vision side, too
        assert counted["counted_macs"] < unpruned["counted_macs"]
    assert unpruned["cache_bytes"] >= unpruned["visual_cache_bytes"]
    assert unpruned["visual_tokens"] + TEXT_BEFORE + TEXT_AFTER > 80  # beyond Gemma's window
