"""What every method promises, over all methods that are registered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.pruning import (
    PruningInputs,
    Selection,
    get_pruner,
    list_pruners,
    parse_budget,
    parse_options,
    pruner_class,
)
from llava.pruning.grid import grid_points

TOKENS = 49
BEFORE_DECODER = [name for name in list_pruners() if pruner_class(name).place != "decoder"]


def make_inputs(seed=0, views=3, tokens=TOKENS, kind="iid", valid=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    features, image = draw(views, tokens, 24), draw(views, tokens, 10)
    if kind == "duplicated":
        features[:, tokens // 2 :] = features[:, : tokens - tokens // 2].clone()
    elif kind == "zero":
        features[:, ::2], image[:, ::3] = 0, 0
    elif kind == "constant":
        features[:], image[:] = features[:, :1].clone(), image[:, :1].clone()
    elif kind == "not finite":
        features[:, 5], image[:, 7] = torch.inf, torch.nan
    return PruningInputs(
        features,
        encoder_features=draw(views, tokens, 12),
        image_embeds=image,
        text_embeds=draw(views, 2, 10),
        query_embeds=draw(views, 4, 24),
        valid=valid,
        view_ids=torch.arange(views) + 7,
    )


@pytest.mark.parametrize("name", BEFORE_DECODER)
@pytest.mark.parametrize("keep", [1, 2, 17, TOKENS - 1, TOKENS])
@pytest.mark.parametrize("kind", ["iid", "duplicated", "zero", "constant", "not finite"])
def test_exactly_m_distinct_ascending_indices(name, keep, kind):
    selection = get_pruner(name, keep_tokens=keep).select(make_inputs(kind=kind))
    assert selection.indices.shape == (3, keep)
    assert selection.indices.dtype == torch.int64
    assert selection.indices.min() >= 0
    assert selection.indices.max() < TOKENS
    assert (selection.indices.diff(dim=1) > 0).all()
    assert selection.mask.sum(-1).tolist() == [keep] * 3


@pytest.mark.parametrize("name", BEFORE_DECODER)
@given(seed=st.integers(0, 1000), keep=st.integers(1, TOKENS - 1), share=st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_padding_only_fills_what_valid_tokens_cannot(name, seed, keep, share):
    valid = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(seed)) < share
    selection = get_pruner(name, keep_tokens=keep).select(make_inputs(seed, valid=valid))
    assert selection.indices.shape == (3, keep)
    assert (selection.indices.diff(dim=1) > 0).all()
    assert selection.eligible.sum(-1).tolist() == valid.sum(-1).clamp_max(keep).tolist()
    assert (selection.mask & ~valid).sum() == 0


@pytest.mark.parametrize("name", BEFORE_DECODER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_gives_what_its_members_give(name, dtype):
    inputs = make_inputs(views=5, dtype=dtype)
    pruner = get_pruner(name, keep_tokens=9)
    together = pruner.select(inputs).indices
    for view in range(5):
        fields = {k: v[view : view + 1] for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
        assert torch.equal(pruner.select(PruningInputs(**fields)).indices[0], together[view])


@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_same_answer_twice(name):
    pruner = get_pruner(name, keep_tokens=9)
    assert torch.equal(pruner.select(make_inputs()).indices, pruner.select(make_inputs()).indices)


@pytest.mark.parametrize("name", BEFORE_DECODER)
@pytest.mark.parametrize("keep", [TOKENS, TOKENS + 1, 10**6])
def test_keeping_everything_is_the_identity(name, keep):
    inputs = make_inputs()
    selection = get_pruner(name, keep_tokens=keep).select(inputs)
    assert selection.is_identity
    assert selection.gather(inputs.features) is inputs.features


@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_gather_keeps_dtype_and_rows(name):
    inputs = make_inputs(dtype=torch.bfloat16)
    selection = get_pruner(name, keep_tokens=5).select(inputs)
    kept = selection.gather(inputs.features)
    assert kept.dtype == torch.bfloat16
    for view in range(3):
        assert torch.equal(kept[view], inputs.features[view, selection.indices[view]])


def test_permuted_tokens_permute_a_selection_that_ignores_order():
    inputs = make_inputs()
    pruner = get_pruner("script", keep_tokens=9, gsp=False)
    order = torch.randperm(TOKENS)
    moved = PruningInputs(
        inputs.features[:, order], image_embeds=inputs.image_embeds[:, order], text_embeds=inputs.text_embeds
    )
    assert torch.equal(pruner.select(moved).mask, pruner.select(inputs).mask[:, order])


# --- controls ------------------------------------------------------------------------------------------------------


def test_uniform_is_the_formula():
    for keep in (1, 7, 16, 48):
        expected = [int((i + 0.5) * TOKENS / keep) for i in range(keep)]
        assert get_pruner("uniform", keep_tokens=keep).select(make_inputs()).indices[0].tolist() == expected


def test_grid_is_a_grid_where_one_fits():
    points = grid_points(576, 64)
    rows, columns = sorted({p // 24 for p in points}), sorted({p % 24 for p in points})
    assert len(rows) == len(columns) == 8
    assert set(torch.tensor(rows).diff().tolist()) == {3}
    assert points == sorted(r * 24 + c for r in rows for c in columns)
    assert {len(grid_points(576, keep)) == keep for keep in range(1, 577)} == {True}


def test_grid_needs_a_square():
    with pytest.raises(ValueError, match="square layout of tokens, got 50"):
        get_pruner("grid", keep_tokens=4).select(make_inputs(tokens=50))


def test_random_is_uniform_and_differs_by_view_and_seed():
    inputs = make_inputs(views=2000)
    counts = get_pruner("random", keep_tokens=10).select(inputs).mask.sum(0)
    expected = 2000 * 10 / TOKENS
    assert ((counts - expected).abs() < 5 * (expected * (1 - 10 / TOKENS)) ** 0.5).all()
    first, second = (get_pruner("random", keep_tokens=10, seed=s).select(inputs).indices for s in (0, 1))
    assert (first != second).any(-1).float().mean() > 0.99


# --- budgets, registry, command-line options -----------------------------------------------------------------------


@pytest.mark.parametrize("share, tokens, count", [(0.5, 576, 288), (0.1, 576, 58), (0.001, 576, 1), (1 / 9, 576, 64)])
def test_a_share_rounds_half_up_and_never_to_nothing(share, tokens, count):
    assert get_pruner("random", keep_tokens=share).count(tokens) == count


@pytest.mark.parametrize("budget", [0, -1, 1.5, 1.0, 0.0, "64", True, None, float("nan")])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="keep_tokens must be a count"):
        get_pruner("random", keep_tokens=budget)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "", "nan", "1.0"])
def test_bad_budget_text_is_refused(text):
    with pytest.raises(ValueError, match="keep_tokens must be a count"):
        parse_budget(text)


def test_budget_text():
    assert parse_budget("64") == 64
    assert parse_budget("0.25") == 0.25


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match=f"known pruners: {', '.join(list_pruners())}"):
        get_pruner("scirpt")
    with pytest.raises(ValueError, match=r"no option tua; its options: keep_tokens, .*tau"):
        get_pruner("script", tua=0.3)


def test_options_from_text_get_their_types():
    options = parse_options("script", ["tau=0.3", "gsp=false", "relevance=projector", "relevance_sign=-1", "seed=4"])
    assert options == {"tau": 0.3, "gsp": False, "relevance": "projector", "relevance_sign": -1, "seed": 4}
    assert parse_options("script", ["relevance_sign=none", "keep_tokens=0.5"]) == {
        "relevance_sign": None,
        "keep_tokens": 0.5,
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("tau", "key=value"),
        ("tau=high", "tau must be a number, got 'high'"),
        ("gsp=maybe", "gsp must be true or false"),
        ("taw=1", "no option taw; its options:"),
    ],
)
def test_bad_option_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_options("script", [text])


def test_pruners_are_values():
    pruner = get_pruner("script", tau=0.4)
    assert pruner == get_pruner("script", tau=0.4)
    with pytest.raises(AttributeError):
        pruner.tau = 0.5


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"features": torch.zeros(3, 4)}, "features must be"),
        ({"features": torch.zeros(2, 3, 4), "image_embeds": torch.zeros(2, 4, 4)}, "image_embeds must start with"),
        ({"features": torch.zeros(2, 3, 4), "text_embeds": torch.zeros(3, 1, 4)}, "text_embeds must have 1 or 2 rows"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruningInputs(**fields)


def test_selection_mask_leaves_out_fillers():
    selection = Selection(torch.tensor([[0, 3]]), 5, torch.tensor([[True, False]]))
    assert selection.mask.tolist() == [[True, False, False, False, False]]
