"""The paper's figures: ``python -m llava.eval.figures``."""

import sys

from llava.eval.figures.command import main

if __name__ == "__main__":
    sys.exit(main())
