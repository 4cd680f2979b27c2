"""Which source of relevance is taken, what is said of it, and what is refused."""

import logging

import pytest

from llava.pruning import get_pruner
from llava.relevance.policy import Announcer, Offer, settle

EVERYTHING = Offer()
NO_CLIP = Offer(no_joint_space="no CLIP is named")
NO_ATTENTION = Offer(no_joint_space="no CLIP is named", no_attention="its first layer is recurrent")
NOTHING = Offer(no_joint_space="no CLIP is named", no_words="no tokenizer is loaded", no_attention="no decoder")


@pytest.mark.parametrize("name", ["script", "cdpruner", "trim", "script_release"])
def test_auto_takes_the_joint_space_where_there_is_one_and_never_the_projector(name):
    taken = [settle(get_pruner(name), offer)[1].source for offer in (EVERYTHING, NO_CLIP, NO_ATTENTION)]
    assert taken == ["clip", "language", "language"]


def test_the_choice_says_what_it_took_and_why():
    _, choice = settle(get_pruner("script"), NO_ATTENTION)
    assert str(choice) == (
        "relevance=language: read in the language model's embeddings alone, because its first layer is recurrent; "
        "no CLIP is named"
    )
    assert "because" not in str(settle(get_pruner("script", relevance="language"), NO_CLIP)[1])


@pytest.mark.parametrize(
    "source, offer, message",
    [
        ("clip", NO_CLIP, "cannot have relevance=clip: no CLIP is named. Instead, here work relevance=language, qk,"),
        ("qk", NO_ATTENTION, "its first layer is recurrent. Instead, here work relevance=language, words, projector"),
        ("auto", NOTHING, "no CLIP is named; no tokenizer is loaded. Instead, here work relevance=none"),
        ("words", NOTHING, "no tokenizer is loaded"),
    ],
)
def test_a_source_that_cannot_be_had_is_refused_with_those_that_can(source, offer, message):
    with pytest.raises(ValueError, match=message):
        settle(get_pruner("script", relevance=source), offer)


def test_options_of_another_source_are_refused():
    with pytest.raises(
        ValueError, match=r"took relevance=language .no CLIP is named., but relevance_sign=1 means nothing"
    ):
        settle(get_pruner("script", relevance_sign=1), NO_CLIP)
    with pytest.raises(ValueError, match=r"heads=h.json weighs an attention that cannot be read"):
        settle(get_pruner("script", heads="h.json"), NO_ATTENTION)
    with pytest.raises(ValueError, match=r"heads=h.json means nothing with relevance=clip"):
        settle(get_pruner("script", heads="h.json"), EVERYTHING)
    assert settle(get_pruner("script", relevance_sign=1), EVERYTHING)[0].relevance == "clip"


def test_methods_that_read_no_question_have_no_source():
    for method in (get_pruner("random"), get_pruner("fastv"), get_pruner("script", relevance="none")):
        assert settle(method, NOTHING) == (method, None)


def test_a_choice_is_told_once(caplog):
    method, choice = settle(get_pruner("script"), NO_CLIP)
    told = Announcer()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            told.tell(method, choice)
    assert [record.getMessage() for record in caplog.records] == [f"pruner 'script' reads the question with {choice}"]
