"""Queries and keys of a decoder's first attention, against what the model's own forward hands to its attention.

At position 0 rotary embedding is the identity: a batch of prompts of one token each, run through the model itself with
an attention function that writes down what it is given, shows queries and keys without rotary.
"""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava.relevance.first_attention import FirstAttention, UnreadableAttentionError
from llava.relevance.language import attention_mass

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
RECURRENT = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, {"head_dim": 16}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen2_5_vl": (lambda **options: hf.Qwen2_5_VLConfig(text_config=options).text_config, MROPE),
    "qwen3": (hf.Qwen3Config, {"head_dim": 16}),
    "qwen3_vl": (lambda **options: hf.Qwen3VLConfig(text_config=options).text_config, MROPE),
    "qwen3_5": (hf.Qwen3_5TextConfig, RECURRENT),
    "qwen3_next": (
        hf.Qwen3NextConfig,
        RECURRENT | {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gemma": (hf.GemmaConfig, {}),
    "gemma2": (hf.Gemma2Config, SLIDING | {"query_pre_attn_scalar": 100}),
    "gemma3": (hf.Gemma3TextConfig, SLIDING | {"query_pre_attn_scalar": 100}),
    "gemma4": (
        hf.Gemma4TextConfig,
        SLIDING | {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    "glm4": (hf.Glm4Config, {"attention_bias": True}),
    "phi3": (hf.Phi3Config, {}),
    "cohere": (hf.CohereConfig, {"use_qk_norm": True}),
    "cohere2": (hf.Cohere2Config, SLIDING),
    "granite": (hf.GraniteConfig, {"attention_multiplier": 0.3, "embedding_multiplier": 12.0}),
    "olmo2": (hf.Olmo2Config, {}),
    "apertus": (hf.ApertusConfig, {}),
    "exaone4": (hf.Exaone4Config, SLIDING),
    "smollm3": (hf.SmolLM3Config, {}),
    "lfm2": (hf.Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
}


def built(name: str) -> nn.Module:
    """A tiny decoder with random weights, of its norms and biases too."""
    config, options = FAMILIES[name]
    torch.manual_seed(3)
    model = AutoModel.from_config(config(**TEXT | options)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.2, 0.4)
    return model.requires_grad_(False)


def seen_by_attention(model: nn.Module, layer: int, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries (l, heads, d_h), keys (l, key heads, d_h) and scaling that the model's attention is given for (l, d)."""
    seen = []

    def record(module, query, key, value, *_, scaling=None, **__):
        if module.layer_idx == layer:
            seen.append((query[:, :, 0], key[:, :, 0], module.head_dim**-0.5 if scaling is None else scaling))
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, 1).transpose(1, 2), None

    for earlier in model.layers[:layer]:
        earlier.forward = lambda hidden_states, *_, **__: hidden_states
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "recorded", record)
        model.set_attn_implementation("recorded")
        model(inputs_embeds=embeds[:, None], use_cache=False)
    return seen[0]


def looked_at(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> list[float]:
    """p_qk of words' queries (t, h, d_h) and tokens' keys (n, k, d_h), one number at a time."""
    words, heads, width = queries.shape
    tokens, groups, _ = keys.shape
    total = [0.0] * tokens
    for head in range(heads):
        key_head = head * groups // heads
        most = [0.0] * tokens
        for word in range(words):
            products = [
                sum(float(queries[word, head, c]) * float(keys[j, key_head, c]) for c in range(width)) * scaling
                for j in range(tokens)
            ]
            powers = [math.exp(product - max(products)) for product in products]
            most = [max(old, power / sum(powers)) for old, power in zip(most, powers, strict=True)]
        total = [old + new / heads for old, new in zip(total, most, strict=True)]
    return [value / sum(total) for value in total]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_queries_and_keys_are_those_that_its_own_attention_is_given(name):
    model = built(name)
    found = FirstAttention.find(model)
    words, tokens = torch.randn(3, 32), torch.randn(4, 32)
    theirs = seen_by_attention(model, found.layer, torch.cat([words, tokens]))
    torch.testing.assert_close(found.queries(words), theirs[0][:3])
    torch.testing.assert_close(found.keys(tokens), theirs[1][3:])
    assert found.scaling == pytest.approx(theirs[2])
    assert found.queries(words).shape == (3, found.heads, found.head_dim)
    expected = looked_at(theirs[0][:3], theirs[1][3:], theirs[2])
    torch.testing.assert_close(found.distribution(words[None], tokens[None])[0], torch.tensor(expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_words_enter_the_first_layer_as_the_embedding_module_gives_them(name):
    """Families that scale in their embedding module (Gemma) are scaled once, as those that do it later (Granite)."""
    model, ids, entered = built(name), torch.tensor([[5, 9, 11]]), []
    model.layers[0].register_forward_pre_hook(
        lambda _, positional, named: entered.append(positional[0] if positional else named["hidden_states"]),
        with_kwargs=True,
    )
    model(input_ids=ids, use_cache=False)
    found = FirstAttention.find(model)
    torch.testing.assert_close(model.get_input_embeddings()(ids) * found.input_scale, entered[0])


def test_layers_without_softmax_attention_are_passed_over():
    assert FirstAttention.find(built("qwen3_5")).layer == 3
    assert FirstAttention.find(built("lfm2")).layer == 1
    assert FirstAttention.find(built("qwen3")).layer == 0
    config = hf.Qwen3_5TextConfig(**TEXT | RECURRENT | {"layer_types": ["linear_attention"] * 4})
    with pytest.raises(UnreadableAttentionError, match="none of its layers has softmax attention"):
        FirstAttention.find(AutoModel.from_config(config))


def test_a_model_with_a_head_is_read_through():
    config, options = FAMILIES["llama"]
    model = hf.LlamaForCausalLM(config(**TEXT | options))
    assert FirstAttention.find(model).attention is model.model.layers[0].self_attn


class Lora(nn.Module):
    """A projection with a low-rank part beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.out_features = base, base.out_features
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, entered):
        return self.base(entered) + self.up(self.down(entered))


class Quantised(nn.Module):
    """A projection whose weight is held in bytes and has no shape that tells anything."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.abs().max() / 127
        self.weight = nn.Parameter((base.weight / self.scale).round().to(torch.int8).view(-1, 1), requires_grad=False)
        self.shape, self.out_features = base.weight.shape, base.out_features

    def forward(self, entered):
        return entered @ (self.weight.view(self.shape) * self.scale).mT


@pytest.mark.parametrize("wrapper", [Lora, Quantised])
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "olmo2"])
def test_projections_are_called_never_read_as_weights(name, wrapper):
    model = built(name)
    attention = model.layers[FirstAttention.find(model).layer].self_attn
    attention.q_proj, attention.k_proj = wrapper(attention.q_proj), wrapper(attention.k_proj)
    found, embeds = FirstAttention.find(model), torch.randn(4, 32)
    queries, keys, _ = seen_by_attention(model, found.layer, embeds)
    torch.testing.assert_close(found.queries(embeds), queries)
    torch.testing.assert_close(found.keys(embeds), keys)


@pytest.mark.parametrize("name", FAMILIES)
def test_few_words_taken_back_through_the_projection_look_at_the_same(name):
    model = built(name)
    found = FirstAttention.find(model)
    words, tokens = torch.randn(1, 1, 32), torch.randn(2, 9, 32)
    valid = torch.rand(2, 9) < 0.7
    queries = found.queries(words)
    expected = attention_mass(queries, found.keys(tokens), found.scaling, None, valid)
    torch.testing.assert_close(attention_mass(*found.compared(queries, tokens), found.scaling, None, valid), expected)


@pytest.mark.parametrize("words, plain", [(1, True), (8, False)])
def test_keys_are_computed_only_where_they_are_less_work(words, plain, monkeypatch):
    model = built("llama")
    found = FirstAttention.find(model)
    queries, tokens = found.queries(torch.randn(1, words, 32)), torch.randn(2, 9, 32)
    calls = []
    projection = found.attention.k_proj
    monkeypatch.setattr(projection, "forward", lambda x: calls.append(x) or nn.functional.linear(x, projection.weight))
    keys = found.compared(queries, tokens)[1]
    assert (keys.shape[-1] == 32) == plain == (not calls)
    hook = projection.register_forward_hook(lambda *_: None)
    found.compared(queries, tokens)
    hook.remove()
    assert len(calls) == (1 if plain else 2)  # a hook may change what comes out


class EngineProjection(nn.Module):
    """A serving engine's fused projection: the bias that is to be added later stands beside the output."""

    def __init__(self, *parts: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)

    def forward(self, entered):
        return entered @ self.weight.mT, None


@pytest.mark.parametrize("name", ["mistral", "qwen3_5"])
def test_a_ranks_share_of_an_engines_fused_heads(name):
    """Two ranks with half of the heads each; their masses added are the whole's."""
    model = built(name)
    whole = FirstAttention.find(model)
    attention = whole.attention
    words, tokens = torch.randn(1, 3, 32), torch.randn(2, 6, 32)
    expected = whole.mass(words, tokens)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    del attention.q_proj, attention.k_proj, attention.v_proj
    shares = []
    for rank in range(2):
        halves = []
        for projection in projections:
            half = projection.weight.shape[0] // 2
            halves.append(nn.Linear(32, half, bias=False))
            halves[-1].weight = nn.Parameter(projection.weight[rank * half : (rank + 1) * half])
        attention.qkv_proj = EngineProjection(*halves)
        attention.q_size, attention.attn_output_gate = 2 * whole.head_dim, whole.gated
        shares.append(FirstAttention.find(model).mass(words, tokens))
    torch.testing.assert_close(shares[0] + shares[1], expected)
    assert not torch.allclose(shares[0], shares[1])


def test_offloaded_weights_are_brought_by_the_modules_own_hooks():
    from accelerate import cpu_offload

    model, embeds = built("qwen2"), torch.randn(4, 32)
    expected = FirstAttention.find(model).queries(embeds)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.layers[0].self_attn.q_proj.weight.is_meta
    torch.testing.assert_close(FirstAttention.find(model).queries(embeds), expected)


def latent_attention():
    return AutoModel.from_config(
        hf.DeepseekV3Config(
            **TEXT
            | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        )
    )


def on_meta():
    with torch.device("meta"):
        return AutoModel.from_config(hf.LlamaConfig(**TEXT))


def on_another_stage():
    model = AutoModel.from_config(hf.LlamaConfig(**TEXT))
    model.layers[0] = nn.Identity()
    return model


def emptied():
    model = AutoModel.from_config(hf.LlamaConfig(**TEXT))
    weight = model.layers[0].self_attn.k_proj.weight
    weight.data, weight.ds_id = torch.empty(0), 0  # as DeepSpeed's ZeRO-3 leaves it
    return model


def test_a_weight_that_was_packed_into_another_is_no_absence():
    model = AutoModel.from_config(hf.LlamaConfig(**TEXT))
    model.layers[0].self_attn.k_proj.weight.data = torch.empty(0)  # vLLM on a CPU
    FirstAttention.find(model)


def fused_in_an_unknown_way():
    return AutoModel.from_config(hf.GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))


@pytest.mark.parametrize(
    "make, reason",
    [
        (latent_attention, r"layer 0: DeepseekV3Attention has latent attention \(kv_a_proj_with_mqa"),
        (on_meta, "the parameter weight of its .* is not on this device"),
        (emptied, "the parameter weight of its Linear is not on this device"),
        (on_another_stage, "layer 0: Identity has no self_attn"),
        (fused_in_an_unknown_way, "GPTNeoXLayer has no self_attn"),
    ],
)
def test_what_cannot_be_read_says_why(make, reason):
    with pytest.raises(UnreadableAttentionError, match=reason) as error:
        FirstAttention.find(make())
    assert error.value.reason in str(error.value)


def test_a_served_lora_layer_is_read_by_its_base():
    """vLLM's would choose an adapter for each token of the step that runs."""
    model = AutoModel.from_config(hf.LlamaConfig(**TEXT))
    attention = model.layers[0].self_attn
    words = torch.randn(1, 3, TEXT["hidden_size"])
    expected = FirstAttention.find(model).queries(words)
    served = nn.Module()
    served.base_layer, served.punica_wrapper = attention.q_proj, object()
    attention.q_proj = served
    torch.testing.assert_close(FirstAttention.find(model).queries(words), expected, atol=0, rtol=0)
