"""On a GPU a selection never waits for its result, and gives what the CPU gives."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch

from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningInputs, get_pruner
from llava.pruning.decoder_pruner import CutInputs
from method_inputs import BEFORE_DECODER, TOKENS, inputs_for, make_inputs
from records import GOLDEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="whether the CPU waits for a GPU takes a GPU to see"),
    pytest.mark.filterwarnings("ignore:.* tokens per view; with"),
]
DEVICE = "cuda"
LOOKS_AT_PADDING = {"downsample"}  # the CPU cuts its pictures out: with padding it has to know where
FACTORISES = {"prunesid"}  # torch looks whether the eigenvectors were found


@contextmanager
def refuse_to_wait():
    """Within, an operation that waits for the GPU raises RuntimeError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def to_device(inputs):
    """A dataclass with its tensors moved."""
    moved = {name: value.to(DEVICE) for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(inputs, **moved)


def without_waiting(call):
    """The result of a call that must not wait; a first one compiles kernels, which may."""
    call()
    with refuse_to_wait():
        return call()


def some_padding(views=3):
    return torch.rand(views, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_methods_before_the_decoder(name, padded, dtype):
    if padded and name in LOOKS_AT_PADDING:
        pytest.skip(f"{name} has to know where the padding is")
    inputs = inputs_for(name, valid=some_padding() if padded else None, dtype=dtype)
    pruner = get_pruner(name, keep_tokens=9)
    moved = to_device(inputs)
    selection = pruner.select(moved) if name in FACTORISES else without_waiting(lambda: pruner.select(moved))
    expected = pruner.select(inputs)
    assert torch.equal(selection.indices.cpu(), expected.indices)
    if expected.made is not None:
        assert torch.allclose(selection.made.cpu(), expected.made, atol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("options", [{"gsp": False}, {"restrict": True}, {"graph": "exhaustive"}, {"dpp": False},
                                     {"relevance": "projector"}, {"relevance": "none"}])  # fmt: skip
def test_the_options_of_script(options):
    inputs = make_inputs()
    pruner = get_pruner("script", keep_tokens=9, **options)
    moved = to_device(inputs)
    selection = without_waiting(lambda: pruner.select(moved))
    assert torch.equal(selection.indices.cpu(), pruner.select(inputs).indices)


@pytest.mark.parametrize("name", ["script", "cdpruner", "divprune", "script_release"])
def test_long_views(name):
    """One selection over more tokens than one program takes."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(1, tokens, width, generator=generator) for tokens, width in ((1500, 256), (1500, 32), (1, 32))]
    inputs = PruningInputs(draw[0], image_embeds=draw[1], text_embeds=draw[2])
    pruner = get_pruner(name, keep_tokens=40)
    moved = to_device(inputs)
    selection = without_waiting(lambda: pruner.select(moved))
    assert torch.equal(selection.indices.cpu(), pruner.select(inputs).indices)


@pytest.mark.parametrize("name, options", [("fastv", {}), ("pyramiddrop", {}), ("dart", {}), ("sparsevlm", {}),
                                           ("sparsevlm", {"version": 2})])  # fmt: skip
def test_methods_inside_the_decoder(name, options):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    views, heads, rows = 2, 16, 1 if name in ("fastv", "pyramiddrop") else 6
    eligible = some_padding(views)
    inputs = CutInputs(
        attention=draw(views, heads, rows, TOKENS).softmax(-1),
        raters=torch.ones(views, rows, dtype=torch.bool),
        position_products=draw(views, rows, TOKENS),
        keys=draw(views, TOKENS, 8),
        text_keys=draw(views, 6, 8),
        hidden=draw(views, TOKENS, 16),
        final=draw(views, TOKENS, 16),
        text_final=draw(views, 6, 16),
        eligible=eligible,
        able=int(eligible.sum(-1).min()),
    )
    pruner = get_pruner(name, **options)
    make = pruner.made(inputs.able - 12)
    moved = to_device(inputs)
    kept, made = without_waiting(lambda: pruner.choose_at(moved, 12, make))
    expected_kept, expected_made = pruner.choose_at(inputs, 12, make)
    assert torch.equal(kept.cpu(), expected_kept)
    assert (made is None) == (expected_made is None)
    assert made is None or torch.allclose(made.cpu(), expected_made, atol=1e-4)
    without_waiting(lambda: pruner.rate(moved.final, moved.text_final))


@pytest.mark.parametrize("name", ["script", "trim", "divprune", "uniform", "random", "visionzip", "pool"])
def test_between_the_model_and_a_method(pixels_of, name):
    """Nothing from the question, read beside the vision tower, to the spliced prompt waits."""
    checkpoint = GOLDEN / "checkpoints/llava-v1.5-tiny-wide"
    tokenizer, model, _, _ = load_pretrained_model(str(checkpoint), device=DEVICE, dtype=torch.float32)
    pixels, sizes = pixels_of("llava-v1.5-tiny-wide", "land640x480", "tall300x900")
    encoded = model.encode_pictures(torch.as_tensor(pixels).to(DEVICE), sizes)
    ids = tokenizer_image_token("USER: <image>\nWhat is this? ASSISTANT:", tokenizer, return_tensors="pt")
    pruner = get_pruner(name, keep_tokens=7)
    asked = {"images": encoded, "pruner": pruner, "query": ["Is it red?", "Where is it?"]}
    prompts = without_waiting(lambda: model.embed_prompts(ids.expand(2, -1), **asked))
    assert all(tokens.is_pruned for tokens in prompts.kept)
