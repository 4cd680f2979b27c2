"""The two witnesses of `language`, against loops of plain numbers written from the formulas, and their invariants."""

from __future__ import annotations

import math

import pytest
import torch

from llava.relevance import language
from llava.relevance.language import (
    as_distribution,
    attention_distribution,
    attention_mass,
    language_relevance,
    multiply_adds,
    word_distribution,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


def pointed_at(words: list[list[float]], tokens: list[list[float]], weigh: bool) -> list[float]:
    """p_words of one view, one number at a time."""
    n, rows, told = len(tokens), [], []
    for word in words:
        row = [cosine(word, token) for token in tokens]
        mean = sum(row) / n
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / (n - 1))
        rows.append(softmax([(value - mean) / deviation for value in row]))
        told.append(math.log(n) + sum(value * math.log(value) for value in rows[-1]) if weigh else 1.0)
    return [sum(g * row[j] for g, row in zip(told, rows, strict=True)) / sum(told) for j in range(n)]


@pytest.mark.parametrize("weigh", [True, False])
def test_words_are_the_formula_over_eligible_tokens_and_real_words(weigh):
    words, tokens = normal(2, 5, 8), normal(2, 9, 8, seed=1)
    word_mask, valid = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    word_mask[1, 3:], valid[0, [2, 7]] = False, False
    p = word_distribution(words, tokens, word_mask, valid, weigh)
    for view in range(2):
        own_words, own_tokens = words[view, word_mask[view]].tolist(), tokens[view, valid[view]].tolist()
        expected = torch.tensor(pointed_at(own_words, own_tokens, weigh))
        torch.testing.assert_close(p[view, valid[view]], expected, rtol=1e-4, atol=1e-6)
    assert (p[~valid] == 0).all()


def test_a_word_that_tells_more_weighs_more():
    """One word stands out on one token, the other nowhere in particular."""
    tokens = torch.eye(16)[None]
    pointing, vague = torch.eye(16)[3], torch.ones(16) + 0.01 * normal(16)
    words = torch.stack([pointing, vague])[None]
    assert word_distribution(words, tokens)[0, 3] > 1.5 * word_distribution(words, tokens, weigh=False)[0, 3]


def head_distribution(queries, keys, scaling, weights):
    """p_qk of one view, one number at a time: queries [t][h][d_h], keys [n][k][d_h]."""
    n, heads, groups = len(keys), len(queries[0]), len(keys[0])
    total = [0.0] * n
    for h in range(heads):
        rows = []
        for word in queries:
            products = [sum(a * b for a, b in zip(word[h], key[h // (heads // groups)], strict=True)) for key in keys]
            rows.append(softmax([product * scaling for product in products]))
        total = [old + weights[h] * max(row[j] for row in rows) for j, old in enumerate(total)]
    return [value / sum(total) for value in total]


@pytest.mark.parametrize("block", [language.LARGEST_BLOCK, 1])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0, 1.0, 0.25, 3.0]])
def test_heads_are_the_formula_over_eligible_tokens_and_real_words(monkeypatch, weights, block):
    monkeypatch.setattr(language, "LARGEST_BLOCK", block)
    queries, keys = normal(2, 4, 6, 5), normal(2, 7, 2, 5, seed=1)
    word_mask, valid = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    word_mask[0, 2:], valid[1, [0, 4]] = False, False
    given = None if weights is None else torch.tensor(weights)
    p = attention_distribution(queries, keys, 0.7, word_mask, valid, given)
    for view in range(2):
        expected = head_distribution(
            queries[view, word_mask[view]].tolist(), keys[view, valid[view]].tolist(), 0.7, weights or [1.0] * 6
        )
        torch.testing.assert_close(p[view, valid[view]], torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert (p[~valid] == 0).all()
    torch.testing.assert_close(
        attention_distribution(queries, keys), attention_distribution(queries, keys, 1 / math.sqrt(5))
    )


def test_relevance_is_the_logarithm_of_one_plus_n_p():
    valid = torch.tensor([[True, True, True, False]])
    p_words, p_qk = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.1, 0.7, 0.2, 0.0]])
    both = language_relevance(p_words, p_qk, valid)[0].tolist()
    assert both == pytest.approx([math.log(1 + 3 * 0.3), math.log(1 + 3 * 0.6), math.log(1 + 3 * 0.1), 0])
    assert language_relevance(None, p_qk, valid)[0, 1].item() == pytest.approx(math.log(1 + 3 * 0.7))
    assert language_relevance(p_words, None)[0, 0].item() == pytest.approx(math.log(1 + 4 * 0.5))
    with pytest.raises(ValueError, match="p_words, p_qk or both"):
        language_relevance(None, None)


def scores(words, tokens, queries, keys, word_mask=None, valid=None):
    """r of both witnesses."""
    p_words = word_distribution(words, tokens, word_mask, valid)
    return language_relevance(p_words, attention_distribution(queries, keys, None, word_mask, valid), valid)


def inputs(views=3, t=4, n=10):
    return (
        normal(views, t, 8),
        normal(views, n, 8, seed=1),
        normal(views, t, 4, 6, seed=2),
        normal(views, n, 2, 6, seed=3),
    )


def test_the_order_of_tokens_and_of_words_does_not_count():
    words, tokens, queries, keys = inputs()
    order, other = torch.randperm(10), torch.randperm(4)
    expected = scores(words, tokens, queries, keys)[:, order]
    torch.testing.assert_close(scores(words, tokens[:, order], queries, keys[:, order]), expected)
    permuted = scores(words[:, other], tokens[:, order], queries[:, other], keys[:, order])
    torch.testing.assert_close(permuted, expected)


def test_views_do_not_see_each_other_and_padding_counts_for_nothing():
    words, tokens, queries, keys = inputs()
    together = scores(words, tokens, queries, keys)
    for view in range(3):
        one = slice(view, view + 1)
        torch.testing.assert_close(scores(words[one], tokens[one], queries[one], keys[one]), together[one])
    word_mask, valid = torch.arange(6) < torch.full((3, 1), 4), torch.arange(13) < torch.full((3, 1), 10)
    padded = [
        torch.cat([given, torch.full_like(given[:, :more], fill)], 1)
        for given, more, fill in ((words, 2, 9.0), (tokens, 3, -7.0), (queries, 2, 9.0), (keys, 3, 50.0))
    ]
    result = scores(*padded, word_mask, valid)
    torch.testing.assert_close(result[:, :10], together)
    assert (result[:, 10:] == 0).all()


def test_one_question_is_shared_by_all_views():
    words, tokens, queries, keys = inputs()
    shared = scores(words[:1], tokens, queries[:1], keys)
    each = scores(words[:1].expand(3, -1, -1), tokens, queries[:1].expand(3, -1, -1, -1), keys)
    torch.testing.assert_close(shared, each)


def test_masses_of_ranks_add_up_to_the_whole():
    _, _, queries, keys = inputs()
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
    ranks = [
        attention_mass(
            queries[:, :, 2 * r : 2 * r + 2], keys[:, :, r : r + 1], head_weights=weights[2 * r : 2 * r + 2]
        )
        for r in range(2)
    ]
    torch.testing.assert_close(
        as_distribution(ranks[0] + ranks[1]), attention_distribution(queries, keys, head_weights=weights)
    )


def test_what_a_head_adds_to_all_keys_changes_nothing():
    """Families with biases have heads whose products are all large."""
    _, _, queries, keys = inputs()
    shifted = attention_distribution(queries, keys + 10 * normal(2, 6, seed=9))
    torch.testing.assert_close(shifted, attention_distribution(queries, keys), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["equal tokens", "no words", "no tokens but one", "zeros", "not finite"])
def test_what_says_nothing_makes_all_tokens_alike(case):
    words, tokens, queries, keys = inputs()
    word_mask, valid, alike = None, None, math.log(2)
    if case == "equal tokens":
        tokens, keys = tokens[:, :1].expand(-1, 10, -1), keys[:, :1].expand(-1, 10, -1, -1)
    elif case == "no words":
        word_mask = torch.zeros(3, 4, dtype=torch.bool)
    elif case == "no tokens but one":
        tokens, keys = tokens[:, :1], keys[:, :1]
    elif case == "zeros":
        tokens, keys = torch.zeros_like(tokens), torch.zeros_like(keys)
    else:
        words, queries = torch.full_like(words, torch.nan), torch.full_like(queries, torch.inf)
    result = scores(words, tokens, queries, keys, word_mask, valid)
    torch.testing.assert_close(result, torch.full_like(result, alike))


def test_a_token_that_is_not_finite_is_looked_at_by_nobody():
    words, tokens, queries, keys = inputs()
    tokens[1, 4], keys[1, 4] = torch.nan, torch.inf
    result = scores(words, tokens, queries, keys)
    assert result.isfinite().all()
    assert attention_distribution(queries, keys)[1, 4] == 0
    torch.testing.assert_close(result[0], scores(*inputs())[0])


def test_a_view_without_tokens_that_take_part_is_all_zero():
    words, tokens, queries, keys = inputs()
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[2] = False
    result = scores(words, tokens, queries, keys, None, valid)
    assert (result[2] == 0).all()
    assert result[:2].isfinite().all()


def test_half_precision_is_computed_in_float32():
    words, tokens, queries, keys = (given.bfloat16() for given in inputs())
    result = scores(words, tokens, queries, keys)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, scores(*(given.float() for given in (words, tokens, queries, keys))))


def test_the_cost_at_the_sizes_of_qwen2_5_vl_7b_is_a_fraction_of_a_thousandth_of_prefill():
    """Hidden 3584, 28 layers, key width 512, MLPs of 18944; 1,000 visual tokens, 20 words, a prompt of 1,100."""
    prompt, hidden, key_width = 1100, 3584, 512
    a_layer = (
        prompt * hidden * (2 * hidden + 2 * key_width + 3 * 18944) + prompt * prompt * hidden
    )  # causal: half of 2
    prefill = 28 * a_layer
    ours = multiply_adds(n=1000, t=20, d=hidden, d_q=hidden, d_kv=key_width)
    assert 1.8e9 < ours < 2.5e9
    assert 0.0002 < ours / prefill < 0.0005
    assert ours < 0.002 * prefill
    parts = [multiply_adds(1000, 20, hidden, hidden, key_width, words=w, qk=not w) for w in (True, False)]
    assert sum(parts) == ours
    assert multiply_adds(1000, 20, hidden, hidden, key_width, fused=True) < 0.004 * prefill
