"""Methods inside the decoder as mathematics: recorded selections, budgets over depth, invariants."""

import warnings
from itertools import pairwise

import pytest
import torch

from llava.pruning import get_pruner, tokens_per_layer
from llava.pruning.dart import pivot_tokens, unlike_pivots
from llava.pruning.decoder_pruner import (
    CutInputs,
    attention_rows,
    highest,
    last_row_scores,
    parse_layers,
    scaled_layers,
)
from llava.pruning.sparsevlm import (
    cluster_count,
    pool_size,
    recycle,
    recycling_pool,
    text_raters,
    text_relation,
)
from records import selection_cases

METHODS = ("dart", "fastv", "pyramiddrop", "sparsevlm")


def cuts_of(name, tokens, target, depth, **options):
    """Kept counts, layers of the cuts, and the average; warnings are the business of another test."""
    pruner = get_pruner(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cuts = pruner.cuts(tokens, target, depth)
    counts = pruner.counts_of(cuts, tokens, depth)
    return [cut.keep for cut in cuts], [cut.after for cut in cuts], counts


# --- recorded selections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("fastv"))
def test_fastv_is_the_published_ranking(case, tensors):
    picture = slice(case["prefix"], case["prefix"] + case["n"])
    inputs = CutInputs(attention=tensors["attention_last_row"][:, :, None, picture], able=case["n"])
    kept = get_pruner("fastv").choose_at(inputs, case["R"])[0][0]
    if "tied_at_cut" in tensors:
        sure, tied = (set(tensors[name].tolist()) for name in ("strictly_above_cut", "tied_at_cut"))
        assert sure <= set(kept.tolist()) <= sure | tied
        assert sorted(set(kept.tolist()) - sure) == sorted(tied)[: case["R"] - len(sure)]  # our rule: lowest first
    else:
        assert torch.equal(kept, tensors["kept_image"].sort().values)


def rotary(states, base):
    """Rotate (B, h, N, c) by positions 0..N-1."""
    width = states.shape[-1]
    angles = torch.arange(states.shape[2])[:, None] / base ** (torch.arange(0, width, 2) / width)
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
    turned = torch.cat([-states[..., width // 2 :], states[..., : width // 2]], -1)
    return states * cos + turned * sin


@pytest.mark.parametrize("case, tensors", selection_cases("pdrop"))
def test_pyramiddrop_is_the_published_ranking(case, tensors):
    hidden = tensors["hidden"]

    def heads(weight):
        return rotary((hidden @ weight.mT).unflatten(-1, (case["heads"], -1)).transpose(1, 2), case["rope_base"])

    queries, keys = heads(tensors["w_q"]), heads(tensors["w_k"])
    rows = attention_rows(queries[:, :, -1:], keys, queries.shape[-1] ** -0.5, [hidden.shape[1] - 1])
    picture = slice(case["prefix"], case["prefix"] + case["current"])
    scores = last_row_scores(rows[..., picture])
    assert torch.allclose(scores[-1], tensors["scores_last_sample"], atol=1e-6)
    kept = get_pruner("pyramiddrop").choose_at(CutInputs(attention=rows[..., picture]), case["keep"])[0]
    offset = 0 if tensors["kept"].max() < case["current"] else case["prefix"]
    assert torch.equal(kept, tensors["kept"].sort(-1).values - offset)


@pytest.mark.parametrize("case, tensors", selection_cases("sparsevlm_rater"))
def test_raters_are_the_published_ones(case, tensors):
    scores, raters = text_raters(tensors["visual"][None], tensors["text"][None])
    assert torch.allclose(scores[0], tensors["text_scores"], atol=1e-6)
    assert raters[0].nonzero().flatten().tolist() == tensors["raters"].tolist()


@pytest.mark.parametrize("case, tensors", selection_cases("sparsevlm_prune"))
def test_sparsevlm_is_the_published_ranking(case, tensors):
    rows = tensors["text_rows"][None]
    raters = torch.zeros(1, rows.shape[2], dtype=torch.bool)
    raters[0, tensors["raters"]] = True
    assert torch.allclose(text_relation(rows, raters)[0], tensors["relation"], rtol=0, atol=1e-7)
    pruner = get_pruner("sparsevlm", version=int(case["version"][0]))
    keep = pruner.kept(case["schedule"][{2: 0, 6: 1, 15: 2}[case["layer"]]], case["n"])
    inputs = CutInputs(attention=rows, raters=raters, able=case["n"])
    assert torch.equal(pruner.choose_at(inputs, keep)[0][0], tensors["kept"].sort().values)


@pytest.mark.parametrize("case, tensors", selection_cases("sparsevlm_position"))
def test_version_2_divides_by_raw_products_of_positions(case, tensors):
    rows, raters = tensors["text_rows"].float()[None], tensors["raters"]
    inputs = CutInputs(
        attention=rows,
        raters=torch.ones(1, len(raters), dtype=torch.bool),
        position_products=tensors["term"][None, raters],
        able=case["n"],
    )
    kept = get_pruner("sparsevlm", version=2).choose_at(inputs, case["kept"])[0][0]
    assert torch.equal(kept, tensors["kept"].sort().values)


@pytest.mark.parametrize("case, tensors", selection_cases("sparsevlm_recycle"))
def test_recycling_is_the_published_one(case, tensors):
    dropped = torch.zeros(1, case["n"], dtype=torch.bool)
    dropped[0, tensors["pruned_ids"]] = True
    assert pool_size(case["n"] - case["keep"]) == case["pool"]
    assert cluster_count(case["pool"]) == case["clusters"]
    pool = recycling_pool(tensors["relation"][None], dropped, case["pool"])
    assert pool[0].tolist() == tensors["pool_ids"].tolist()
    made, cluster, centres = recycle(tensors["features"][None, pool[0]], case["clusters"])
    assert centres[0].tolist() == tensors["centre_pool_pos"].tolist()
    assert cluster[0].tolist() == tensors["assignment"].tolist()
    assert torch.allclose(made[0], tensors["merged"], atol=1e-5)


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tokens, layers, table",
    [
        ("fastv", 576, 32, {192: [166], 128: [98], 64: [30], 32: [32], 16: [16]}),
        ("fastv", 576, 40, {192: [172], 128: [104], 64: [37]}),
        ("fastv", 2880, 32, {640: [491], 320: [149], 160: [160]}),
        (
            "pyramiddrop",
            576,
            32,
            {192: [322, 180, 100], 128: [241, 101, 42], 64: [110, 21, 4], 32: [64, 32, 16], 16: [32, 16, 8]},
        ),
        ("pyramiddrop", 2880, 32, {640: [1208, 507, 212], 320: [551, 105, 20], 160: [320, 160, 80]}),
        (
            "sparsevlm",
            576,
            32,
            {192: [300, 200, 110], 128: [303, 110, 36], 96: [238, 48, 26], 64: [66, 30, 17], 32: [15], 16: [16]},
        ),
        ("sparsevlm", 2880, 32, {640: [570], 320: [240], 160: [75]}),
        ("dart", 576, 32, {192: [166], 128: [98], 64: [30], 32: [32], 16: [16]}),
    ],
)
def test_the_budget_table(name, tokens, layers, table):
    for target, kept in table.items():
        assert cuts_of(name, tokens, target, layers)[0] == kept


def test_averages_beside_the_budget_table():
    assert cuts_of("pyramiddrop", 576, 192, 32, layers="8/16/24")[0] == [145, 36, 9]
    halves = cuts_of("pyramiddrop", 576, 64, 32, layers="8/16/24", ratio=0.5)
    assert halves[0] == [288, 144, 72]
    assert sum(halves[2]) / 32 == 270
    for target, leaving, entering in ((192, 113, 206.5), (128, 39, 145.4), (96, 27, 114.1), (64, 18, 82.3)):
        counts = cuts_of("sparsevlm", 576, target, 32)[2]
        assert counts[-1] == leaving
        assert sum(counts) / 32 == pytest.approx(entering, abs=0.07)
    assert sum(cuts_of("fastv", 576, 32, 32)[2]) / 32 == 66
    assert sum(cuts_of("fastv", 576, 16, 32)[2]) / 32 == 51
    assert sum(cuts_of("fastv", 2880, 160, 32)[2]) / 32 == 330
    assert [sum(cuts_of("sparsevlm", 2880, m, 32)[2][-1:]) for m in (640, 320, 160)] == [640, 320, 160]
    assert cuts_of("sparsevlm", 576, 16, 32)[2][-1] == 16  # no recycling
    assert cuts_of("sparsevlm", 576, 128, 32, version=2)[2][::6] == [576, 238, 108, 60, 60, 60]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tokens, layers", [(576, 32), (2880, 32), (169, 24), (49, 4), (576, 4), (576, 3), (576, 2)])
def test_counts_stand_in_order_and_average_the_budget_where_that_is_possible(name, tokens, layers):
    for target in {1, 2, tokens // 9, tokens // 3, tokens // 2, tokens - 1}:
        _, places, counts = cuts_of(name, tokens, target, layers)
        assert places == sorted(set(places))
        assert 1 <= places[0] <= places[-1] < layers
        assert counts[0] == tokens
        assert all(1 <= later <= earlier for earlier, later in pairwise(counts))
        reachable = places[0] * tokens / layers + 1 < target
        if reachable and (name != "sparsevlm" or layers < 32):
            assert abs(sum(counts) / layers - target) <= 1 + len(places)
        assert cuts_of(name, tokens, target, layers, budget="nominal")[0][0] <= 2 * target


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_below_the_floor_says_the_floor_and_what_is_done(name):
    with pytest.warns(
        UserWarning, match=r"cannot average 16 of 576 tokens over 32 layers \(the floor is .* on average"
    ):
        get_pruner(name).counts(576, 16, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_pruner(name).counts(576, 128, 32)
        get_pruner(name, budget="nominal").counts(576, 16, 32)
        assert get_pruner(name).counts(576, 576, 32) == [576] * 32


def test_counts_of_any_method():
    assert tokens_per_layer(get_pruner("script", keep_tokens=64), 576, 3) == [64] * 3
    assert tokens_per_layer(None, 576, 2) == [576, 576]
    assert tokens_per_layer(get_pruner("fastv", keep_tokens=64), 576, 32) == [576] * 2 + [30] * 30
    assert tokens_per_layer(get_pruner("fastv", keep_tokens=1 / 9), 576, 32) == [576] * 2 + [30] * 30


def test_padding_is_left_out_of_the_counts():
    assert get_pruner("fastv").counts(576, 240, 4, eligible=100) == [576, 100, 100, 100]
    assert get_pruner("sparsevlm").counts(576, 400, 4, eligible=100)[1] == 99 + 1


def test_cuts_move_with_the_depth_of_shallow_decoders():
    assert scaled_layers([2, 8, 16], 32) == scaled_layers([2, 8, 16], 40) == [2, 8, 16]
    assert scaled_layers([2, 8, 16], 16) == [1, 4, 8]
    assert scaled_layers([2, 8, 16], 4) == [1, 2, 3]
    assert scaled_layers([2, 8, 16], 3) == [1, 2]
    assert scaled_layers([2], 2) == [1]
    with pytest.raises(ValueError, match="1 layer has no place"):
        scaled_layers([2], 1)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("fastv", {"layer": 0}, "layer must be .*an integer at least 1"),
        ("dart", {"pivots": 0}, "pivots must be an integer at least 1"),
        ("pyramiddrop", {"layers": "8/2"}, "written like 2/8/16"),
        ("pyramiddrop", {"ratio": 1.0}, "ratio must be a finite number between"),
        ("sparsevlm", {"version": 3}, "version must be an integer between 1 and 2"),
        ("sparsevlm", {"layers": "1/2/3/4"}, "at most three cuts"),
        ("fastv", {"newlines": "keep"}, "has no option newlines"),
        ("fastv", {"scope": "global"}, "has no option scope"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_pruner(name, **options)


def test_cuts_that_do_not_fit_are_refused():
    assert parse_layers("3") == [3]
    with pytest.raises(ValueError, match="a cut after 4 layers does not fit a decoder of 4"):
        get_pruner("fastv", layer=4).counts(576, 300, 4)
    with pytest.raises(ValueError, match="a cut after 24 layers does not fit a decoder of 20"):
        get_pruner("pyramiddrop", layers="8/24").counts(576, 300, 20)


# --- mathematics ---------------------------------------------------------------------------------------------------


def cut_inputs(views=3, n=20, t=6, heads=4, width=12, kind="iid", eligible=None):
    attention = torch.rand(views, heads, t, n)
    keys, hidden = torch.randn(views, n, width), torch.randn(views, n, width)
    if kind == "constant":
        attention[:], keys[:], hidden[:] = 0.1, 1.0, 1.0
    elif kind == "zero":
        attention[:], keys[:, ::2], hidden[:, ::2] = 0, 0, 0
    able = n if eligible is None else int(eligible[0].sum())
    return CutInputs(
        attention=attention,
        raters=torch.rand(views, t) < 0.7,
        position_products=torch.full((views, t, n), 0.5),
        keys=keys,
        text_keys=torch.randn(views, t, width),
        hidden=hidden,
        final=hidden,
        text_final=torch.randn(views, t, width),
        eligible=eligible,
        able=able,
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["iid", "constant", "zero"])
@pytest.mark.parametrize("keep", [1, 2, 9, 19])
def test_exactly_the_asked_number_ascending(name, kind, keep):
    inputs = cut_inputs(kind=kind)
    pruner = get_pruner(name)
    kept, made = pruner.choose_at(inputs, keep, pruner.made(20 - keep))
    assert kept.shape == (3, keep)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < 20
    assert made is None or (made.shape[:2] == (3, pruner.made(20 - keep)) and made.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_padding_is_never_chosen(name):
    eligible = torch.arange(20) % 2 == 0
    kept, _ = get_pruner(name).choose_at(cut_inputs(eligible=eligible.expand(3, -1)), 9)
    assert (kept % 2 == 0).all()


def test_equal_scores_go_to_the_lower_index():
    assert highest(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 3).tolist() == [[0, 1, 2]]


def test_permuted_tokens_permute_the_selection():
    order = torch.randperm(20)
    inputs = cut_inputs()
    moved = CutInputs(attention=inputs.attention[..., order])
    mask = torch.zeros(3, 20).scatter(1, get_pruner("fastv").choose_at(inputs, 7)[0], 1.0)
    assert torch.equal(torch.zeros(3, 20).scatter(1, get_pruner("fastv").choose_at(moved, 7)[0], 1.0), mask[:, order])


def test_attention_rows_are_rows_of_attention():
    queries, keys = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    whole = (queries @ keys.repeat_interleave(2, 1).mT * 0.3 + torch.full((9, 9), -torch.inf).triu(1)).softmax(-1)
    places = [2, 5, 8]
    assert torch.allclose(attention_rows(queries[:, :, places], keys, 0.3, places), whole[:, :, places], atol=1e-6)
    half = attention_rows(queries[:, :, places].bfloat16(), keys.bfloat16(), 0.3, places)
    assert half.dtype == torch.float32


def test_all_text_rates_where_none_stands_out():
    assert text_raters(torch.randn(1, 5, 8), torch.ones(1, 3, 8))[1].all()
    assert text_raters(torch.randn(1, 5, 8), torch.randn(1, 1, 8))[1].all()


def test_recycled_tokens_are_means_of_clusters_that_repeat():
    """Three well-separated heaps of equal points: every mean is one of them, and noise decides nothing."""
    heaps = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = heaps[torch.tensor([0, 1, 2] * 7)][None]
    made, cluster, centres = recycle(points, 3)
    assert torch.allclose(made[0].sort(0).values, heaps.sort(0).values, atol=1e-4)
    assert torch.equal(cluster[0].gather(0, centres[0]), torch.arange(3))
    whole = torch.randn(2, 31, 6)
    for one, both in zip(recycle(whole[:1], 4), recycle(whole, 4), strict=True):
        assert torch.equal(one[0], both[0])


def test_dart_keeps_pivots_and_takes_the_least_similar_in_turn():
    inputs = cut_inputs(views=1)
    visual, text = pivot_tokens(inputs.keys, inputs.text_keys, 4)
    assert torch.equal(visual[0], inputs.keys[0].abs().sum(-1).topk(4).indices)
    taken = visual[0].tolist()
    pivots = [inputs.final[0, i] for i in visual[0]] + [inputs.text_final[0, i] for i in text[0]]
    for pivot, share in zip(pivots, [2, 1, 1, 1, 1, 1, 1, 1], strict=True):  # 13 = 4 + 9
        similarity = torch.cosine_similarity(inputs.final[0], pivot[None], dim=-1)
        order = [i for i in similarity.argsort().tolist() if i not in taken]
        taken += order[:share]
    chosen = unlike_pivots(inputs.final, visual, inputs.text_final, text, 13)
    assert chosen[0].tolist() == sorted(taken)
    assert torch.equal(get_pruner("dart").choose_at(inputs, 13)[0], chosen)
