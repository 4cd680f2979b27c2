"""Says aloud that the tests here did not run where lmms-eval is missing."""

import importlib.util


def pytest_terminal_summary(terminalreporter):
    if importlib.util.find_spec("lmms_eval") is None:
        terminalreporter.section("tests/eval/lmms_eval: NOT ALL RUN, lmms-eval is missing", yellow=True)
        terminalreporter.write_line("bash scripts/test_lmms_eval.sh makes its environment and runs them")
