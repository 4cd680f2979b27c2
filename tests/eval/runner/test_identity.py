"""What a run's identity depends on: the code that it runs, and no other; so that a new method joins an old table."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval.runner import identity, run
from llava.eval.runner.imports import reached
from llava.pruning import get_pruner, list_pruners, pruner_class

ROOT = Path(__file__).parents[3]
TOY = ROOT / "playground" / "toy"
BENCHMARKS = ("gqa", "textvqa")
METHOD = '''"""A method of a user's own: the last tokens."""

from dataclasses import dataclass

import torch

from llava.pruning.base import Pruner, register


@register
@dataclass(frozen=True, kw_only=True)
class Last(Pruner):
    """The last tokens of each view."""

    name = "last"

    def choose(self, inputs, keep):
        places = torch.arange(inputs.tokens, device=inputs.features.device).expand(inputs.views, -1)
        if inputs.valid is not None:
            places = places.masked_fill(~inputs.valid, -1)
        return places.topk(keep).indices.sort().values, {}
'''


ASK = """
import sys
from pathlib import Path
from llava.eval.runner import run
from llava.eval.tables import report

toy, out = map(Path, sys.argv[1:])
data = ["--model-path", str(toy / "llava-toy-v1.5"), "--data-root", str(toy / "data/eval"), "--output-root", str(out)]
for benchmark in ("gqa", "textvqa"):
    method = ["--pruner", "last", "--keep-tokens", "16", "--device", "cpu", "--limit", "4", "--score"]
    assert run.main(["--benchmark", benchmark, *data, *method]) == 0
sys.exit(report.main([str(path) for path in sorted(out.glob("*/answers/*/*/*.run"))]))
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the package with a method more, another method and another benchmark edited."""
    folder = tmp_path / "tree"
    shutil.copytree(ROOT / "llava", folder / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "llava" / "pruning" / "last.py").write_text(METHOD)
    names = folder / "llava" / "pruning" / "__init__.py"
    names.write_text(names.read_text() + "\nfrom llava.pruning.last import Last\n")
    for edited in ("pruning/trim.py", "eval/benchmarks/pope.py", "eval/tables/report.py"):
        path = folder / "llava" / edited
        path.write_text(path.read_text() + "\n# edited\n")
    return folder


@pytest.mark.slow
def test_a_new_method_joins_the_table(tree, tmp_path):
    """Two benchmarks with all tokens and with Script, then a method that did not exist: three rows, all comparable."""
    out = tmp_path / "out"
    for benchmark in BENCHMARKS:
        for keep in ("full", "16"):
            data = ("--data-root", TOY / "data" / "eval", "--output-root", out, "--device", "cpu")
            given = ("--benchmark", benchmark, *data, "--keep-tokens", keep, "--limit", 4, "--score")
            assert run.main([str(one) for one in ("--model-path", TOY / "llava-toy-v1.5", *given)]) == 0
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ASK, str(TOY), str(out)]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line] for line in lines]
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["Method"] for row in rows] == ["unpruned", "last", "script"]
    assert rows[0]["Relative"] == "100.00"
    assert all(float(row["Acc."]) > 0 and float(row["Relative"]) > 0 for row in rows)


def test_no_method_is_part_of_the_common_code():
    common = identity.answering_modules()
    methods = {pruner_class(name).__module__ for name in list_pruners()}
    assert len(methods) > 10
    assert not methods & common
    assert {"llava.model.llava_arch", "llava.conversation", "llava.mm_utils", "llava.pruning.base"} <= common
    assert not [name for name in common if name.startswith(("llava.integrations", "llava.serve"))]
    assert {name for name in common if name.startswith("llava.eval.benchmarks")} == {"llava.eval.benchmarks.question"}


def test_a_methods_code_is_its_file_and_what_it_alone_imports():
    codes = {name: identity.method_code(get_pruner(name)) for name in list_pruners()}
    assert len(set(codes.values())) == len({pruner_class(name).__module__ for name in list_pruners()})
    assert identity.code_of(None)["method_code"] is None
    assert "llava.pruning.script" in reached(["llava.pruning.script"])


def test_imports_are_followed_by_name(tmp_path):
    """One name out of a package brings the file it comes from; what only a type checker reads brings nothing."""
    root = tmp_path / "llava"
    (root / "methods").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "start.py": "from llava.methods import one as first\nimport llava.whole\nfrom . import beside\n",
        "whole.py": "def call():\n    from llava.late import x\n",
        "late.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import llava.types\n",
        "types.py": "",
        "beside.py": "import os\n",
        "methods/__init__.py": "from llava.methods.a import one\nfrom llava.methods.b import two\n",
        "methods/a.py": "from .c import three\n",
        "methods/b.py": "",
        "methods/c.py": "",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    found = reached(["llava.start"], root=root)
    assert found == {
        *("llava.start", "llava.methods.a", "llava.methods.c", "llava.whole", "llava.late", "llava.beside"),
    }
    assert reached(["llava.start"], ["llava.methods"], root) == found - {"llava.methods.a", "llava.methods.c"}
