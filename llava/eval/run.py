"""Ask the questions of a benchmark: ``python -m llava.eval.run``."""

import sys

from llava.eval.runner.run import main

if __name__ == "__main__":
    sys.exit(main())
