"""``keep_tokens="auto"``: how it is written, who takes it, and that it keeps the first tokens of the fixed order."""

import dataclasses

import pytest
import torch

from llava.pruning import PruningInputs, get_pruner, list_pruners, parse_budget, parse_options, pruner_class
from llava.pruning.adaptive import residual_share, uncovered_share
from llava.pruning.auto_budget import AutoBudget, parse_auto
from llava.pruning.functional import cosine_similarity
from llava.pruning.similarity import DenseSimilarity, RowSimilarity

FINDERS = ["cdpruner", "mmtok", "scope", "script"]
VIEWS, TOKENS = 4, 90


def scenes(kinds=(3, 8, 20, 40), valid=None, pictures=None):
    """Views whose tokens are of few to many kinds."""
    generator = torch.Generator().manual_seed(1)
    features = []
    for count in kinds:
        centres = torch.randn(count, 48, generator=generator)
        features.append(centres[torch.arange(TOKENS) % count] + 0.1 * torch.randn(TOKENS, 48, generator=generator))
    features = torch.stack(features)
    return PruningInputs(
        features,
        encoder_features=features,
        relevance=0.5 + torch.rand(len(kinds), TOKENS, generator=generator),
        query_embeds=torch.randn(len(kinds), 3, 48, generator=generator),
        class_attention=torch.rand(len(kinds), 2, TOKENS, generator=generator).softmax(-1),
        valid=valid,
        pictures=pictures,
    )


def kept_sets(selection):
    return [set(row.nonzero().flatten().tolist()) for row in selection.mask]


# --- as text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, budget, full, tag",
    [
        ("auto", AutoBudget(), "auto:0.95", "auto95"),
        ("auto:.9", AutoBudget(0.9), "auto:0.9", "auto90"),
        ("auto:0.925", AutoBudget(0.925), "auto:0.925", "auto92.5"),
        ("auto:gain=6e-4", AutoBudget(gain=6e-4), "auto:gain=0.0006", "auto-gain0.0006"),
        ("auto:floor=8", AutoBudget(floor=8), "auto:0.95:floor=8", "auto95-floor8"),
        (
            "auto:0.9:ceiling=0.25:floor=8",
            AutoBudget(0.9, floor=8, ceiling=0.25),
            "auto:0.9:floor=8:ceiling=0.25",
            "auto90-floor8-ceiling0.25",
        ),
        ("auto:1:ceiling=64", AutoBudget(1.0, ceiling=64), "auto:1.0:ceiling=64", "auto100-ceiling64"),
        (
            "auto:gain=6e-4:floor=8:mean_tokens=64.5",
            AutoBudget(gain=6e-4, floor=8, mean_tokens=64.5),
            "auto:gain=0.0006:floor=8:mean_tokens=64.5",
            "auto-mean64.5",
        ),
    ],
)
def test_a_rule_is_read_and_written(text, budget, full, tag):
    assert parse_auto(text) == budget == parse_auto(str(budget))
    assert (str(budget), budget.tag) == (full, tag)
    assert parse_budget(text) == full == get_pruner("script", keep_tokens=text).keep_tokens
    assert parse_options("script", [f"keep_tokens={text}"]) == {"keep_tokens": full}


@pytest.mark.parametrize(
    "text, message",
    [
        ("auto:0", "above 0 and is at most 1; got 0.0"),
        ("auto:95", "above 0 and is at most 1; got 95.0"),
        ("auto:much", "is written auto, auto:0.9"),
        ("auto:", "is written auto, auto:0.9"),
        ("auto:0.9:gain=0.1", "is written auto, auto:0.9"),
        ("auto:floor=8:0.9", "is written auto, auto:0.9"),
        ("auto:quality=0.9", "is written auto, auto:0.9"),
        ("auto:floor=8:floor=9", "is written auto, auto:0.9"),
        ("auto:floor=0.5", "is written auto, auto:0.9"),
        ("auto:floor=0", "floor is a count from 1; got 0"),
        ("auto:ceiling=1.5", "ceiling is a count from 1 or a share"),
        ("auto:floor=9:ceiling=8", "floor is at most ceiling"),
        ("auto:gain=nan", "gain lies between 0 and 1"),
        ("automatic", "or auto, auto:0.9"),
        ("auto:mean_tokens=64", "python -m llava.eval.calibrate_budget --mean-tokens 64 .* --store FILE"),
        ("auto:mean_tokens=64:floor=8", "a mean needs curves of pictures like yours"),
        ("auto:0.9:mean_tokens=0", "mean_tokens is a number of tokens from 1; got 0.0"),
        ("auto:mean_tokens=64:curves=", "is written auto, auto:0.9"),
        ("auto:curves=x.json", "curves goes with mean_tokens alone"),
        ("auto:mean_tokens=64:floor=8:curves=x.json", "curves goes with mean_tokens alone"),
    ],
)
def test_what_is_no_rule_is_refused(text, message):
    for read in (parse_budget, lambda text: get_pruner("script", keep_tokens=text)):
        with pytest.raises(ValueError, match=message):
            read(text)


def test_only_methods_that_know_what_they_explain_take_it():
    assert [name for name in list_pruners() if pruner_class(name).finds_budget] == FINDERS
    for name in set(list_pruners()) - set(FINDERS):
        with pytest.raises(ValueError, match=f"'{name}' needs a count or a share: .*{', '.join(FINDERS)}"):
            get_pruner(name, keep_tokens="auto")
    with pytest.raises(ValueError, match="needs dpp=true"):
        get_pruner("script", keep_tokens="auto", dpp=False)


def test_the_count_is_a_bound_and_never_all():
    pruner = get_pruner("script", keep_tokens="auto")
    assert not pruner.count_is_exact
    assert get_pruner("script", keep_tokens=64).count_is_exact
    assert [pruner.count(tokens) for tokens in (576, 169, 2, 1)] == [192, 56, 1, 1]
    assert get_pruner("script", keep_tokens="auto:ceiling=576").count(576) == 575


# --- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["0.8", "gain=0.004"])
@pytest.mark.parametrize("name", FINDERS)
def test_the_first_tokens_of_the_fixed_order_and_more_in_crowded_views(name, rule):
    inputs = scenes()
    pruner = get_pruner(name, keep_tokens=f"auto:{rule}:floor=2:ceiling=40")
    selection = pruner.select(inputs)
    kept = kept_sets(selection)
    counts = [len(tokens) for tokens in kept]
    assert selection.indices.shape == (VIEWS, 40)
    assert counts[0] < counts[-1]
    assert all(2 <= count <= 40 for count in counts)
    for view, count in enumerate(counts):
        fixed = dataclasses.replace(pruner, keep_tokens=count).select(inputs)
        assert kept[view] == kept_sets(fixed)[view]
        alone = pruner.select(inputs.of_views(slice(view, view + 1)))
        assert kept_sets(alone) == [kept[view]]


@pytest.mark.parametrize("name", FINDERS)
def test_a_stricter_rule_keeps_no_fewer(name):
    inputs = scenes()

    def counts(rule):
        selection = get_pruner(name, keep_tokens=f"auto:{rule}:floor=3:ceiling=44").select(inputs)
        return selection.eligible.sum(-1)

    shares = torch.stack([counts(q) for q in (0.05, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0)])
    gains = torch.stack([counts(f"gain={eta}") for eta in (0.5, 0.02, 0.004, 0.001, 1e-9)])
    for grown in (shares, gains):
        assert (grown.diff(dim=0) >= 0).all()
        assert (grown[-1] > grown[0]).all()
    assert (shares[0] == 3).all()


@pytest.mark.parametrize("name", FINDERS)
def test_floor_and_ceiling_alike_are_a_fixed_budget(name):
    inputs = scenes()
    found = get_pruner(name, keep_tokens="auto:0.9:floor=12:ceiling=12").select(inputs)
    fixed = get_pruner(name, keep_tokens=12).select(inputs)
    assert found.eligible.all()
    assert torch.equal(found.indices, fixed.indices)


@pytest.mark.parametrize("name", FINDERS)
def test_padding_is_never_kept_and_does_not_lift_the_count(name):
    valid = torch.ones(VIEWS, TOKENS, dtype=torch.bool)
    valid[0, 7:], valid[1, :50], valid[2] = False, False, False
    selection = get_pruner(name, keep_tokens="auto:1.0:floor=10").select(scenes(valid=valid))
    kept = selection.mask
    assert not (kept & ~valid).any()
    assert kept.sum(-1).tolist()[0] == 7
    assert kept.sum(-1).tolist()[2] == 0


def test_the_floor_is_lower_where_views_share_a_picture():
    """One kind of token: nothing is left to explain after the first."""
    inputs = scenes(kinds=(1, 1, 1), pictures=torch.tensor([0, 1, 1]))
    for name in FINDERS:
        counts = get_pruner(name, keep_tokens="auto:0.5").select(inputs).eligible.sum(-1)
        assert counts.tolist() == [16, 4, 4]


def test_script_ends_its_order_by_the_share_and_keeps_what_the_graph_left():
    """Step 5: D_k and G; tokens of D that the graph dropped explain something, but are not kept."""
    inputs = scenes()
    pruner = get_pruner("script", keep_tokens="auto:0.7:floor=1", gsp_ratio=0.6)
    selection = pruner.select(inputs)
    order, in_graph = selection.details["order"], selection.details["kept_by_gsp"]
    assert in_graph.sum(-1).tolist() == [36] * VIEWS
    similarity = cosine_similarity(inputs.features.double())
    relevance = selection.details["relevance"].double()
    for view, mask in enumerate(selection.mask):
        tokens = order[view].argsort()
        share = residual_share(similarity[view][None], tokens[None], relevance[view][None])[0]
        steps = int((share <= 0.3).nonzero()[0])
        expected = [token for token in tokens[:steps].tolist() if in_graph[view, token]]
        assert sorted(expected) == mask.nonzero().flatten().tolist()


def test_the_uncovered_share_is_what_coverage_lacks():
    generator = torch.Generator().manual_seed(0)
    reach = torch.randn(2, 9, 6, generator=generator)
    order = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(2)])
    share = uncovered_share(reach, order)
    for view in range(2):
        possible = sum(max(0.0, max(reach[view, :, target].tolist())) for target in range(6))
        for k in range(6):
            chosen = order[view, :k].tolist()
            covered = sum(max([0.0, *(float(reach[view, token, t]) for token in chosen)]) for t in range(6))
            assert float(share[view, k]) == pytest.approx(1 - covered / possible, abs=1e-6)
    assert uncovered_share(-reach.abs(), order).tolist() == [[1, 0, 0, 0, 0, 0]] * 2


def test_rows_give_the_share_that_the_matrix_gives():
    inputs = scenes()
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(TOKENS, generator=generator)[:40] for _ in range(VIEWS)])
    dense = DenseSimilarity(inputs.features, all_pairs=True, after_rank=True)
    rows = RowSimilarity(inputs.features)
    shares = [one.residual_share(order, relevance=inputs.relevance) for one in (dense, rows)]
    torch.testing.assert_close(*shares, atol=1e-5, rtol=0)


def test_joined_views_have_one_rule_between_them():
    """scope=global: the floor and the ceiling are those of all tokens; crowded views get more of them."""
    inputs = scenes(kinds=(1, 40)).joined()
    mask = get_pruner("script", keep_tokens="auto:0.9", scope="global").select(inputs, keep=60).mask[0]
    assert 16 <= int(mask.sum()) <= 60
    assert mask[:TOKENS].sum() < mask[TOKENS:].sum()
