"""Run a benchmark of lmms-eval: ``python -m llava.eval.harness``."""

import sys

from llava.eval.lmms_eval.launcher import main

if __name__ == "__main__":
    sys.exit(main())
