"""Our own host as the harness drives it: both forms, batches, ends of answers, repetitions, what is refused."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: scripts/test_lmms_eval.sh makes its environment")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

from llava.eval.lmms_eval import MODELS
from llava.eval.lmms_eval.llava_model import SimpleLlava, system_like, with_placeholders
from llava.eval.lmms_eval.requests import Message, UnreadableVisual, Visual
from records import GOLDEN, load_picture

TINY = str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")
PICTURE = Visual("image", Image.new("RGB", (4, 4)))
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def documents():
    pictures = [load_picture("small97x61"), Image.new("RGB", (60, 40), (200, 30, 30))]
    return {"t": {"test": [{"pictures": [pictures[i % 2]] * (i != 2), "question": f"What is {i}?"} for i in range(4)]}}


def pictures_of(document):
    return document["pictures"]


def messages_of(document):
    content = [{"type": "image", "url": picture} for picture in document["pictures"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": document["question"]}]}]


def make(name, documents, chat=False, **given):
    model = get_model(name, force_simple=not chat)(pretrained=TINY, device="cpu", **given)
    model.task_dict.update(documents)
    return model


def request(document, decoding=GREEDY, chat=False, text=None, opener=None, **metadata):
    text = f"What is {document}?" if text is None else text
    if chat:
        arguments = (text, opener or messages_of, dict(decoding), document, "t", "test")
    else:
        arguments = (text, dict(decoding), opener or pictures_of, document, "t", "test")
    metadata = {"task": "t", "doc_id": document, "repeats": 1, **metadata}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


def texts(results):
    return [result.text for result in results]


def test_the_harness_finds_both_forms():
    for name in MODELS:
        assert get_model(name).is_simple is False
        assert get_model(name, force_simple=True).is_simple is True


def test_both_forms_and_batches_give_the_same_answers(documents):
    """Documents with and without a picture, one at a time and together, pruned at random by the document's number."""
    answers = []
    for chat in (False, True):
        for batch_size in (1, 3):
            given = {"keep_tokens": 4, "pruner": "random", "batch_size": batch_size}
            model = make("script_llava", documents, chat, **given)
            answers.append(texts(model.generate_until([request(number, chat=chat) for number in range(4)])))
            costs = [model.book.answers[key].cost for key in model.used]
            assert sorted(cost.get("visual_tokens", 0) for cost in costs) == [0, 4, 4, 4]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert len(set(answers[0])) > 1


def test_a_fixed_grid_reads_every_picture_in_five_views(documents):
    """The protocol of the paper's LLaVA-NeXT tables; it is part of what is compared before a run goes on."""
    tiled = str(GOLDEN / "checkpoints" / "llava-v1.6-vicuna-tiny")
    given = {"keep_tokens": 4, "image_grid": "672x672", "pruner_args": "exclude_padding=false", "device": "cpu"}
    model = get_model("script_llava", force_simple=True)(pretrained=tiled, **given)
    model.task_dict.update(documents)
    model.generate_until([request(0)])
    assert [model.book.answers[key].cost["visual_tokens"] for key in model.used] == [20]
    assert model.settings()["image_grid"] == [672, 672]
    with pytest.raises(ValueError, match="cut pictures into tiles"):
        make("script_llava", documents, image_grid="672x672")
    with pytest.raises(ValueError, match="image_grid is written WIDTHxHEIGHT"):
        make("script_llava", documents, image_grid="672")
    with pytest.raises(ValueError, match="picture_size is written WIDTHxHEIGHT"):
        make("script_transformers", documents, picture_size="big")


def test_answers_end_where_the_task_says(documents):
    model = make("script_llava", documents)
    [whole] = texts(model.generate_until([request(0, {"max_new_tokens": 12, "do_sample": False})]))
    middle = whole[len(whole) // 2]
    [cut] = texts(model.generate_until([request(0, {"max_new_tokens": 12, "do_sample": False, "until": [middle]})]))
    assert cut == whole[: whole.index(middle)].strip()


def test_repetitions_are_asked_and_padding_is_not(documents):
    model = make("script_llava", documents)
    sampled = {"max_new_tokens": 8, "temperature": 5.0, "do_sample": True}
    again = request(1, sampled)
    torch.manual_seed(0)
    results = texts(model.generate_until([again, again, request(1, sampled, __padding_only__=True)]))
    assert len(model.book.answers) == 2
    assert results[0] != results[1]
    assert results[2] == results[0]


def test_counts_of_a_result(documents):
    model = make("script_llava", documents, keep_tokens=4)
    whole = make("script_llava", documents)
    [pruned], [unpruned] = (one.generate_until([request(0)]) for one in (model, whole))
    dropped = model.model.get_vision_tower().num_patches - 4
    assert unpruned.token_counts.input_tokens - pruned.token_counts.input_tokens == dropped
    assert 1 <= pruned.token_counts.output_tokens <= 6


def test_refused_and_skipped(documents, tmp_path):
    def broken(document):
        raise OSError("truncated file")

    model = make("script_llava", documents)
    with pytest.raises(UnreadableVisual, match=r"task t, document 1: OSError: truncated file"):
        model.generate_until([request(1, opener=broken)])
    with pytest.raises(UnreadableVisual, match=r"there is no file or folder .*gone\.png"):
        model.generate_until([request(0, opener=lambda document: [str(tmp_path / "gone.png")])])
    with pytest.raises(NotImplementedError, match="was not made for videos"):
        model.generate_until([request(0, opener=partial(lambda path, document: [path], str(tmp_path)))])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="this task"):
            method([])
    model = make("script_llava", documents, on_error="skip", answers=str(tmp_path))
    assert texts(model.generate_until([request(1, opener=broken), request(0)]))[0] == ""
    model.clean()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["t"]["questions"] == 1
    assert summary["t"]["unreadable"] == [{"document": 1, "reason": "OSError: truncated file"}]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"conv_template": "nonsense"}, "the model argument conv_template must be one of"),
        ({"mm_spatial_pool_mode": "cubic"}, "mm_spatial_pool_mode must be one of average, max, bilinear"),
        ({"force_sample": 1}, "force_sample must be true or false"),
        ({"max_batch_size": 4}, "unknown model argument max_batch_size"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        SimpleLlava(pretrained=TINY, **given)


@pytest.mark.parametrize(
    "parts, running, times, expected",
    [
        ((PICTURE, "What?"), False, (), "<image>\nWhat?"),
        ((PICTURE, PICTURE, "Which?"), False, (), "<image> <image>\nWhich?"),
        (("First:", PICTURE, "Second:", PICTURE), False, (), "First:\n<image>\nSecond:\n<image>"),
        (("In ", PICTURE, " or ", PICTURE, "?"), True, (), "In <image> or <image>?"),
        ((PICTURE, "What?"), False, ("The video lasts.",), "<image>\nThe video lasts.\nWhat?"),
        ((PICTURE, "What?"), False, (None,), "<image>\nWhat?"),
        (("Only text.",), False, (), "Only text."),
    ],
)
def test_where_placeholders_stand(parts, running, times, expected):
    assert with_placeholders(Message("user", parts, running), times) == expected


def test_a_tasks_system_text_takes_the_templates_place():
    assert system_like("A chat.", "Be brief.") == "Be brief."
    chatml = "<|im_start|>system\nYou are a helpful assistant."
    assert system_like(chatml, "Be brief.") == "<|im_start|>system\nBe brief."
