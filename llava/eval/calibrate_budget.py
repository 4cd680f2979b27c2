"""A rule for an asked mean budget: ``python -m llava.eval.calibrate_budget``, from `llava.eval.measure`."""

import sys

from llava.eval.measure.calibrate_budget import main

if __name__ == "__main__":
    sys.exit(main())
