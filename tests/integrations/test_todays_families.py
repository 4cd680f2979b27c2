"""Families that people run today, each on a tiny instance of the library's class: the promises of the table of hosts.

What a class is asked is in `llava/eval/hosts/checks.py`; here are what each family is expected to say, what a method
is shown of it, and what becomes of made tokens where features enter deeper layers.
"""

from contextlib import nullcontext

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.functional import adaptive_avg_pool2d

from llava.eval.hosts.checks import check_class, class_called
from llava.eval.hosts.command import image_text_classes
from llava.eval.hosts.pictures import prompts_for
from llava.eval.hosts.tiny import build, small_config
from llava.integrations.transformers import UnsupportedModelError
from llava.integrations.transformers.host import find_host
from llava.pruning import get_pruner
from llava.pruning.divprune import DivPrune
from transformers_families import family

CLASSES = image_text_classes()
DEEPSTACK = "`deepstack_visual_embeds`"
TODAY = {  # model type: patches that a token is made of, and what follows the kept tokens beside their embeddings
    "fast_vlm": (1, ""),
    "gemma3n": (1, "`per_layer_inputs`"),
    "glm46v": (4, ""),
    "kimi_k25": (4, ""),
    "lfm2_vl": (4, ""),
    "llama4": (4, ""),
    "minicpmv4_6": (16, ""),
    "molmo2": (4, ""),
    "nemotron_h_omni": (4, ""),
    "perception_lm": (1, ""),
    "qwen3_5_moe": (4, ""),
    "qwen3_vl_moe": (4, DEEPSTACK),
}
NEED_TIMM = {"fast_vlm", "gemma3n", "perception_lm"}
KEEP = 3


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(TODAY))
def model_type(request):
    if request.param in NEED_TIMM:
        pytest.importorskip("timm", reason="their towers are timm's")
    if request.param not in CLASSES:
        pytest.skip(f"Transformers {transformers.__version__} has no {request.param}")
    return request.param


def test_it_keeps_what_the_table_promises(model_type):
    """Everything kept = unpruned, cache = text + kept, alone = in a batch, planes, relevance, gradients."""
    outcome = check_class(model_type, CLASSES[model_type])
    assert outcome.status == "works", outcome.failed or outcome.reason
    patches, beside = TODAY[model_type]
    assert outcome.token == ("a patch" if patches == 1 else f"{patches} patches")
    assert outcome.deep == beside
    assert outcome.views == "picture"


def test_a_method_sees_merged_tokens_and_nothing_below(model_type, monkeypatch):
    """Groups of patches stay whole: what competes are the features behind every merger, as the class computed them."""
    model = build(class_called(CLASSES[model_type]), small_config(model_type))
    prompts = prompts_for(model)
    seen = []
    choose = DivPrune.choose
    monkeypatch.setattr(DivPrune, "choose", lambda *given: seen.append(given[1].features) or choose(*given))
    arguments = prompts.single(1)
    with torch.no_grad(), get_pruner("divprune", keep_tokens=KEEP)(model) as handle:
        model(**arguments)
        computed = prompts._features([1, 2], [2])
    patches, _ = TODAY[model_type]
    views = [view for group in seen for view in group]
    for number, view in zip((1, 2), sorted(views, key=len) if len(seen) > 1 else views, strict=True):
        assert len(view) == prompts.pictures.patches[number] // patches == prompts.counts[number]
    assert [one.picture.view_sizes() for one in handle.kept] == [[len(view)] for view in views]
    if model_type not in ("llama4", "molmo2"):  # these two change their features behind get_image_features
        items = [item.reshape(-1, views[0].shape[-1]) for item in computed]
        assert torch.equal(torch.cat(items), torch.cat(views))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="written with the classes of Transformers 5.23"
)
def test_what_hides_its_pictures_is_refused_with_a_sentence():
    """Phi-4 multimodal is one decoder that looks its pictures up itself: nothing merges features before it."""
    with torch.device("meta"):
        model = transformers.Phi4MultimodalForCausalLM(
            transformers.Phi4MultimodalConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64)
        )
    with pytest.raises(UnsupportedModelError, match=r"no model\.language_model"):
        find_host(model)


# --- made tokens where features enter the layers, too ----------------------------------------------------------------


@pytest.fixture
def door():
    """What the language model of a Qwen3-VL is last called with, for a prompt of one picture of 3 x 3 tokens."""
    host = family("qwen3_vl")
    seen = {}

    def look(_, __, named):
        seen.clear()
        seen.update(named)

    def call(pruner=None):
        with torch.no_grad(), nullcontext() if pruner is None else pruner(host.model) as handle:
            # after the pruner's own, so that it sees what the language model gets
            hook = host.model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
            output = host.model(**host.prompts([[3, "image", 5]], [2]))
            hook.remove()
        return dict(seen), [] if handle is None else handle.kept, output.logits

    return host, call


def test_a_pooled_token_is_pooled_in_every_plane(door):
    host, call = door
    whole, _, _ = call()
    short, [kept], logits = call(get_pruner("pool", keep_tokens=4))
    visual = whole["visual_pos_masks"][0]

    def pooled(plane):
        return adaptive_avg_pool2d(plane.T.reshape(-1, 3, 3), 2).flatten(1).T

    embeds = pooled(whole["inputs_embeds"][0, visual])
    torch.testing.assert_close(short["inputs_embeds"][0, short["visual_pos_masks"][0]], embeds)
    planes = [pooled(plane) for plane in whole["deepstack_visual_embeds"]]
    assert len(planes) == 2
    for plane, found in zip(planes, short["deepstack_visual_embeds"], strict=True):
        torch.testing.assert_close(found, plane)
    assert (kept.count_made, int(kept.as_they_are.sum())) == (4, 0)
    with torch.no_grad():
        by_hand = host.model.model.language_model(
            **short | {"past_key_values": None, "deepstack_visual_embeds": planes}
        )
        expected = host.model.lm_head(by_hand.last_hidden_state)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_merged_tokens_stand_for_all_that_were_dropped_in_every_plane(door):
    """`restore` keeps some tokens and makes means of all others: each plane, weighed by group sizes, keeps its sum."""
    _, call = door
    whole, _, _ = call()
    short, [kept], _ = call(get_pruner("restore", keep_tokens=4, method="divprune"))
    [made] = kept.made
    sizes = torch.cat([torch.ones(2), (made.weights > 0).sum(-1)])
    assert sizes.sum() == 9
    for plane, found in zip(whole["deepstack_visual_embeds"], short["deepstack_visual_embeds"], strict=True):
        torch.testing.assert_close((found * sizes[:, None]).sum(0), plane.sum(0))
        own = kept.as_they_are.nonzero().flatten()
        assert torch.equal(found[:2], plane[own])


def test_kept_tokens_beside_made_ones_keep_their_positions(door):
    """Made tokens stand behind the kept ones, which with mRoPE still say where in the picture they were."""
    _, call = door
    whole, _, _ = call()
    short, [kept], _ = call(get_pruner("restore", keep_tokens=4, method="divprune"))
    own = kept.picture.columns[kept.as_they_are]
    places = short["visual_pos_masks"][0].nonzero().flatten()
    assert torch.equal(short["position_ids"][..., 0, places[:2]], whole["position_ids"][..., 0, own])
    taken = [tuple(place) for place in short["position_ids"][:, 0, places].T.tolist()]
    assert len(set(taken)) == 4


def test_tokens_that_are_no_means_are_refused_there():
    model = family("qwen3_vl").model
    for method in ("visionzip", "trim", "prunesid"):
        with pytest.raises(ValueError, match=r"makes tokens, and Qwen3VL.* in the first layers .* \(pool, restore\)"):
            get_pruner(method, keep_tokens=4).attach(model)
