"""The adapter's logic that needs no harness: arguments, both forms of request, answers that survive a kill."""

import json

import pytest
from PIL import Image

from llava.eval.lmms_eval.answers import Answer, AnswerBook, summarise
from llava.eval.lmms_eval.arguments import ModelArguments, read_arguments
from llava.eval.lmms_eval.requests import (
    Decoding,
    Message,
    UnreadableVisual,
    Visual,
    read_decoding,
    read_request,
)

PICTURE = Image.new("RGB", (4, 4))
DOCUMENTS = {"t": {"test": {3: {"image": PICTURE}}}}


def test_arguments_as_the_harness_parses_them():
    given = {"pretrained": 7, "keep_tokens": 64, "batch_size": "2", "pruner_args": "tau=0.3 gsp_ratio=0.25"}
    arguments = read_arguments(ModelArguments, given)
    assert (arguments.pretrained, arguments.batch_size) == ("7", 2)
    pruner = arguments.make_pruner()
    assert (pruner.name, pruner.keep_tokens, pruner.tau, pruner.gsp_ratio) == ("script", 64, 0.3, 0.25)
    assert read_arguments(ModelArguments, given | {"keep_tokens": 0.25}).make_pruner().keep_tokens == 0.25
    assert read_arguments(ModelArguments, given | {"keep_tokens": "full"}).make_pruner() is None
    assert read_arguments(ModelArguments, given | {"keep_tokens": "auto:0.9"}).make_pruner().auto.coverage == 0.9


@pytest.mark.parametrize(
    "given, message",
    [
        ({"visual_token_num": 64}, "unknown model argument visual_token_num; known ones: pretrained, pruner"),
        ({"pruner": "nonsense"}, "unknown pruner 'nonsense'"),
        ({"pruner_args": "colour=1"}, "pruner 'script' has no option colour"),
        ({"keep_tokens": 0}, "keep_tokens must be a count"),
        ({"batch_size": "auto"}, "batch_size must be a whole number, got 'auto'"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"on_error": "ignore"}, "on_error must be stop or skip"),
        ({"pretrained": ""}, "pretrained is missing"),
    ],
)
def test_wrong_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_arguments(ModelArguments, {"pretrained": "m"} | given)


def simple(text, visuals, decoding=None):
    return (text, decoding or {}, lambda document: visuals, 3, "t", "test")


def test_both_forms_give_the_same_conversation():
    expected = [Message("user", (Visual("image", PICTURE), "What?"))]
    assert read_request(simple("What?", [PICTURE]), is_chat=False).open(DOCUMENTS) == expected
    content = [{"type": "image", "url": PICTURE}, {"type": "text", "text": "What?"}]
    chat = ("What?", lambda document: [{"role": "user", "content": content}], {}, 3, "t", "test")
    assert read_request(chat, is_chat=True).open(DOCUMENTS) == expected
    plain = ("What?", lambda document: [{"role": "user", "content": "What?"}], {}, 3, "t", "test")
    assert read_request(plain, is_chat=True).open(DOCUMENTS) == [Message("user", ("What?",))]


def test_placeholders_say_where_visuals_stand():
    [message] = read_request(simple("a <image> b <image>", ["1.png", "2.mp4"]), False).open(DOCUMENTS)
    assert message.parts == ("a ", Visual("image", "1.png"), " b ", Visual("video", "2.mp4"))
    assert message.running
    assert message.text == "a \n b "
    with pytest.raises(UnreadableVisual, match="2 <image> placeholders for 1 visuals"):
        read_request(simple("a <image> b <image>", ["1.png"]), False).open(DOCUMENTS)


def test_a_task_that_ends_the_process_does_not():
    def opener(document):
        raise SystemExit("video path x.mp4 does not exist")

    with pytest.raises(UnreadableVisual, match="does not exist"):
        read_request(("q", {}, opener, 3, "t", "test"), False).open(DOCUMENTS)
    with pytest.raises(UnreadableVisual, match="got dict"):
        read_request(simple("q", [{"array": [], "sampling_rate": 16000}]), False).open(DOCUMENTS)


def test_decoding():
    assert read_decoding(
        {"until": ["\n\n", ""], "max_new_tokens": 16, "temperature": 0, "do_sample": False}
    ) == Decoding(16, until=("\n\n",))
    assert read_decoding({"until": ".", "temperature": 0.7}).options()["do_sample"]
    assert not read_decoding({"temperature": 0.7, "do_sample": False}).options()["do_sample"]
    assert read_decoding({"do_sample": True}).temperature == 1.0
    assert read_decoding({"temperature": 0}).options() == {
        "max_new_tokens": 1024,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "num_beams": 1,
    }
    assert Decoding(until=("\n", ". ")).cut("yes. no\nmaybe") == "yes"
    assert Decoding(until=("\n",)).cut("yes") == "yes"


def test_keys_tell_questions_apart():
    keys = {
        read_request(simple(text, [], decoding), False, number).key
        for text, decoding, number in (("a", {}, 0), ("b", {}, 0), ("a", {"temperature": 1}, 0), ("a", {}, 1))
    }
    assert len(keys) == 4
    assert read_request(simple("a", []), False).key in keys


def test_answers_survive_and_settings_may_not_change(tmp_path):
    settings = {"pruner": {"name": "script", "keep_tokens": 4}, "seed": (0, 1)}
    answer = Answer("yes", {"visual_tokens": 4.0}, 30, 2, 0.5)
    AnswerBook(tmp_path, settings, rank=0).append([("a", "t", 1, answer)])
    AnswerBook(tmp_path, settings, rank=1).append(
        [("b", "t", 2, answer), ("c", "t", 3, Answer("", unreadable="gone"))]
    )
    with (tmp_path / "answers_0.jsonl").open("a") as file:
        file.write('{"key": "torn')  # killed in the middle of a line
    again = AnswerBook(tmp_path, settings, rank=0)
    assert again.answers == {"a": answer, "b": answer}  # what could not be read is tried again
    again.append([("d", "t", 4, answer)])
    assert set(AnswerBook(tmp_path, settings).answers) == {"a", "b", "d"}
    with pytest.raises(ValueError, match=r"other settings \(seed: \[0, 1\] then, \[0, 2\] now\)"):
        AnswerBook(tmp_path, settings | {"seed": (0, 2)})


def test_summary_counts_what_was_not_put(tmp_path):
    answers = {
        "a": ("t", 1, Answer("yes", {"visual_tokens": 4.0, "newline_tokens": 0}, 30, 2, 0.5)),
        "b": ("t", 2, Answer("no", {"visual_tokens": 8.0, "newline_tokens": 2}, 30, 3, 0.5)),
        "c": ("t", 3, Answer("", unreadable="gone")),
        "d": ("u", 1, Answer("text only")),
    }
    summary = summarise(answers)
    assert summary["t"]["questions"] == 2
    assert summary["t"]["visual_tokens"] == 6.0
    assert summary["t"]["newline_tokens"] == 1.0
    assert summary["t"]["unreadable"] == [{"document": 3, "reason": "gone"}]
    assert "visual_tokens" not in summary["u"]
    book = AnswerBook(tmp_path, {})
    book.write_summary(summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
