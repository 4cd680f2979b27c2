"""Score the answers of a run: ``python -m llava.eval.score``."""

import sys

from llava.eval.runner.scoring import main

if __name__ == "__main__":
    sys.exit(main())
