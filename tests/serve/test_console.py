"""script-llava: every command is a module that can be run, and gets its arguments and its exit status through."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from llava.serve import console

ROOT = Path(__file__).resolve().parents[2]


def is_package(module):
    return importlib.util.find_spec(module).submodule_search_locations is not None


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_is_a_module_that_can_be_run(name):
    module, what = console.COMMANDS[name]
    found = importlib.util.find_spec(f"{module}.__main__") if is_package(module) else importlib.util.find_spec(module)
    source = Path(found.origin).read_text(encoding="utf-8")
    assert 'if __name__ == "__main__":' in source
    assert f"{name} " in console.usage()
    assert what in console.usage()


def test_arguments_and_exit_status_go_through(monkeypatch):
    seen = []

    def run_module(module, run_name, alter_sys):
        seen.append((module, run_name, sys.argv[1:]))
        sys.exit(7)

    monkeypatch.setattr(runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["script-llava"])
    with pytest.raises(SystemExit, match="7"):
        console.main(["chat", "--keep-tokens", "16"])
    assert seen == [("llava.serve.cli", "__main__", ["--keep-tokens", "16"])]


def test_help_and_unknown_commands(capsys):
    assert console.main([]) == 0
    assert "usage: script-llava COMMAND" in capsys.readouterr().out
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("script-llava ")
    assert console.main(["chta\x1b[2J"]) == 2
    assert "unknown command chta\\x1b[2J; commands: chat, eval" in capsys.readouterr().err


def test_the_package_declares_the_command():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'script-llava = "llava.serve.console:main"' in text
