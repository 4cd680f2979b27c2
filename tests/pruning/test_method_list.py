"""No step of adding a method is forgotten: registration, docstring, import, values; and the table made of them."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import llava.pruning
from llava.eval.measure import redundancy
from llava.pruning import Pruner, PruningInputs, list_pruners, pruner_class
from llava.pruning.method_table import END, START, main, method_table, paper
from llava.pruning.redundancy import compared_pairs, intersection_over_union, least_redundant

ROOT = Path(__file__).resolve().parents[2]


def method_classes():
    """Every concrete method that a file of the package defines, registered or not."""
    found = []
    for module in pkgutil.iter_modules(llava.pruning.__path__, "llava.pruning."):
        for cls in vars(importlib.import_module(module.name)).values():
            own = inspect.isclass(cls) and cls.__module__ == module.name
            if own and issubclass(cls, Pruner) and not inspect.isabstract(cls):
                found.append(cls)
    return found


@pytest.mark.parametrize("cls", method_classes(), ids=lambda cls: cls.__name__)
def test_every_method_is_registered_once_under_its_files_name(cls):
    assert pruner_class(cls.name) is cls
    assert cls.__module__ == f"llava.pruning.{cls.name}"
    assert getattr(llava.pruning, cls.__name__) is cls
    assert cls.__name__ in llava.pruning.__all__
    assert cls.__dataclass_params__.frozen


@pytest.mark.parametrize("name", list_pruners())
def test_docstring_follows_the_recipe(name):
    cls = pruner_class(name)
    text = inspect.getdoc(cls)
    words = " ".join(text.split())
    assert re.match(r"[A-Z][^\n]+\.(\n|$| )", text), "the idea in a sentence"
    assert re.search(r"Inputs?\b.*\(B, n, d\)|Inputs?\b.*\(B, ", words), "inputs with their shapes"
    assert re.search(r"Output: ", words), "output"
    if paper(cls) is not None:
        for kind in ("paper", "released code"):
            assert re.search(rf"Deviations from the {kind}(, [^:]+)?: (\(1\)|none)", words), (
                f"deviations from the {kind}"
            )
        assert re.search(r"^1\. ", text, re.MULTILINE), "numbered steps"
    bases = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    for field in dataclasses.fields(cls):
        if field.name not in inherited or cls.__annotations__.get(field.name):
            assert re.search(rf"^ +(\w+, )*{field.name}(, \w+)*: ", text, re.MULTILINE), f"option {field.name}"


@pytest.mark.parametrize("name", list_pruners())
def test_values_of_every_method_are_tested(name):
    """Some test names the method, beside those that go over all of them."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*/test_*.py")]
    assert any(f'"{name}"' in text for text in texts)


@pytest.mark.parametrize("name", list_pruners())
def test_needs_are_fields_of_the_inputs(name):
    fields = {field.name for field in dataclasses.fields(PruningInputs)}
    assert pruner_class(name)().needs <= fields


def test_the_table_has_a_row_per_method_with_links_to_file_and_paper():
    rows = method_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list_pruners()
    for name, row in zip(list_pruners(), rows, strict=True):
        assert f"](llava/pruning/{name}.py)" in row
        assert paper(pruner_class(name)) or row.endswith("| control |")
    fastv = rows[list_pruners().index("fastv")]
    assert fastv.endswith("](https://arxiv.org/abs/2403.06764) |")
    assert "](../llava/pruning/fastv.py)" in method_table(ROOT / "docs")


def test_the_table_is_written_in_place(tmp_path, capsys):
    pages = [tmp_path / name for name in ("page.md", "other.md")]
    for page in pages:
        page.write_text(f"before\n\n{START}\nold\n{END}\n\nafter\n")
    main(["--write", *map(str, pages)])
    for page in pages:
        assert page.read_text() == f"before\n\n{START}\n{method_table(tmp_path)}\n{END}\n\nafter\n"
    pages[0].write_text("nothing")
    with pytest.raises(SystemExit):
        main(["--write", *map(str, pages)])
    assert "must hold the lines" in capsys.readouterr().err


# --- estimators of redundancy --------------------------------------------------------------------------------------


def test_estimators_keep_the_least_redundant():
    """Ten copies of one token beside thirty that differ: an estimator that looks keeps none of the copies."""
    features = torch.eye(40)[None]
    features[:, :10] = features[:, :1].clone()
    for estimator in ("exhaustive", "bipartite"):
        kept = least_redundant(features, estimator, 30)
        assert kept.sum(-1).tolist() == [30]
        assert not kept[0, :10].any()
    drawn = least_redundant(features, "random", 30)
    assert drawn.sum() == 30
    assert not torch.equal(drawn, least_redundant(features, "random", 30, seed=1))
    with pytest.raises(ValueError, match="estimator must be one of exhaustive, bipartite, random, got 'all'"):
        least_redundant(features, "all", 30)


def test_pairs_and_agreement_of_sets():
    assert [compared_pairs(name, 576) for name in ("exhaustive", "bipartite", "random")] == [165600, 82944, 0]
    assert compared_pairs("bipartite", 7) == 12
    first = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    second = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert intersection_over_union(first, second).tolist() == pytest.approx([1 / 3, 1, 1])
    draws = [least_redundant(torch.zeros(400, 576, 1), "random", 58, seed=seed) for seed in (0, 1)]
    assert intersection_over_union(*draws).mean().item() == pytest.approx(0.053, abs=0.01)
    assert intersection_over_union(~draws[0], ~draws[1]).mean().item() == pytest.approx(0.82, abs=0.01)


def test_the_first_table_on_the_toy(capsys):
    assert redundancy.main(["--limit", "4", "--repeats", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]] for line in out.splitlines()[3:6]
    }
    assert list(rows) == ["exhaustive", "bipartite", "random"]
    assert rows["exhaustive"][:3] == ["165600", "1.00", "1.00"]
    assert float(rows["bipartite"][1]) > 0.5 > float(rows["random"][1])
    assert redundancy.main(["--image-folder", "nowhere"]) == 2
    assert "no picture" in capsys.readouterr().err
