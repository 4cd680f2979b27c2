"""What a selection costs: ``python -m llava.eval.selection_speed``."""

import sys

from llava.eval.measure.selection_speed import main

if __name__ == "__main__":
    sys.exit(main())
