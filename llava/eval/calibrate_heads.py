"""Weights of heads for a checkpoint: ``python -m llava.eval.calibrate_heads``, from `llava.eval.measure`."""

import sys

from llava.eval.measure.calibrate_heads import main

if __name__ == "__main__":
    sys.exit(main())
