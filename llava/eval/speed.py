"""How fast our own runner is: ``python -m llava.eval.speed``."""

import sys

from llava.eval.measure.speed import main

if __name__ == "__main__":
    sys.exit(main())
