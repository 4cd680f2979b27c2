"""How the cost of a selection grows: ``python -m llava.eval.selection_scaling``."""

import sys

from llava.eval.measure.selection_scaling import main

if __name__ == "__main__":
    sys.exit(main())
