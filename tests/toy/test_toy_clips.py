"""The toy's clips: what happens in them, and whether selection per frame follows the asked object over time."""

import numpy as np
import pytest
from clips import FIRST_CLIP, FRAMES, found_over_time, make_clip

from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model
from llava.pruning import get_pruner

KEEP = 8  # of 144 tokens of a frame


@pytest.fixture(scope="module")
def found():
    """How often the asked object is found, by method."""
    _, model, processor, _ = load_pretrained_model(DEFAULT_CHECKPOINT, device="cpu")
    pruners = {
        "script": get_pruner("script", keep_tokens=KEEP),
        "clip": get_pruner("script", keep_tokens=KEEP, scope="global"),
        "without the question": get_pruner("script", keep_tokens=KEEP, relevance="none"),
        "random": get_pruner("random", keep_tokens=KEEP),
    }
    return found_over_time(model, processor, 6, pruners)


def test_a_clip_is_the_same_everywhere_and_does_what_its_questions_say():
    for index in range(FIRST_CLIP, FIRST_CLIP + 4):
        clip = make_clip("test", index)
        again = make_clip("test", index)
        assert all(np.array_equal(a, b) for a, b in zip(clip.frames, again.frames, strict=True))
        mover, comer = clip.actors
        assert len(set(mover.boxes)) == FRAMES
        assert comer.boxes[0] is None
        assert comer.boxes[-1] is not None
        assert not comer.moves
        answers = {question.text: question.answer for question in clip.questions}
        assert [answer for text, answer in answers.items() if "moves" in text] == ["Yes", "No"]
        assert [answer for text, answer in answers.items() if "later" in text] == ["No", "Yes"]
        assert clip.questions[-1].answer == f"The {mover.name}"


def test_the_asked_object_is_drawn_where_its_tokens_are():
    clip = make_clip("test", FIRST_CLIP)
    comer = clip.actors[1]
    start = comer.first_frame
    before, after = (np.asarray(clip.frames[t]).astype(int) for t in (start - 1, start))
    left, top, right, bottom = comer.boxes[start]
    assert np.abs(after - before)[top:bottom, left:right].mean() > 5
    assert comer.cells()[start].any()
    assert not comer.cells()[start - 1].any()


def test_selection_per_frame_follows_the_asked_object(found):
    assert found["script"]["frames"] >= 0.85
    assert found["script"]["frames"] >= found["without the question"]["frames"] + 0.15
    assert found["random"]["frames"] <= 0.3
    assert found["script"]["share"] >= 4 * found["random"]["share"]


def test_so_does_a_budget_for_the_clip(found):
    assert found["clip"]["frames"] >= 0.75
    assert found["clip"]["share"] >= 4 * found["random"]["share"]
