"""How well estimators of redundancy agree: ``python -m llava.eval.redundancy``."""

import sys

from llava.eval.measure.redundancy import main

if __name__ == "__main__":
    sys.exit(main())
