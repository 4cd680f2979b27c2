"""The page that says which method to take: its table is what the methods say of themselves."""

import warnings

import pytest
from check_docs import ROOT

from llava.pruning import list_pruners, pruner_class
from llava.pruning.method_table import paper

ATTENTION = {"class_attention", "mean_attention", "key_metric", "class_features"}


def rows():
    lines = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_method_of_a_paper_has_its_row():
    assert set(rows()) == {name for name in list_pruners() if paper(pruner_class(name))}


@pytest.mark.parametrize("name", sorted(rows()))
def test_a_row_says_what_the_method_says(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = pruner_class(name)()
    place, question, attention, makes, auto, _ = rows()[name]
    assert place == method.place
    if method.place != "decoder":
        assert question == ("yes" if method.reads_question else "no")
        assert makes == ("yes" if method.makes_tokens else "no")
    assert attention == ("yes" if method.needs & ATTENTION else "no")
    assert auto == ("yes" if method.finds_budget else "no")
