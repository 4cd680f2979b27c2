"""The caption of a picture of kept tokens, and several of them in one."""

import numpy as np
from PIL import Image

from llava.serve.token_picture import join_panels, with_caption


def test_a_caption_leaves_the_picture_as_it_is():
    picture = Image.new("RGB", (336, 336), (10, 20, 30))
    captioned = np.asarray(with_caption(picture, "What color is the star?", "blue"))
    assert (captioned[:336] == np.asarray(picture)).all()
    band = captioned[336:]
    assert (band == 255).all(-1).mean() > 0.5
    assert (band != 255).any()


def test_a_question_that_is_too_long_is_broken_into_lines():
    picture = Image.new("RGB", (336, 336))
    heights = [with_caption(picture, "What color is it? " * times, "blue").height for times in (1, 4, 8)]
    assert heights == sorted(set(heights))
    margin = np.asarray(with_caption(picture, "What color is it? " * 8, "blue"))[336:, -8:]
    assert (margin == 255).all()  # nothing runs over the edge


def test_upright_panels_stand_side_by_side_and_broad_ones_below_each_other():
    upright, broad = Image.new("RGB", (100, 150)), Image.new("RGB", (300, 150))
    assert join_panels([upright, upright]).size == (208, 150)
    assert join_panels([broad, broad]).size == (300, 308)
    assert join_panels([upright, broad]).size == (300, 308)
    assert join_panels([upright]).size == (100, 150)
