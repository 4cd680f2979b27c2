"""Answers per second of a server under load: ``python -m llava.eval.serving_load``."""

import sys

from llava.eval.measure.serving_load import main

if __name__ == "__main__":
    sys.exit(main())
