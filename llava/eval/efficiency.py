"""Where the time of an answer goes: ``python -m llava.eval.efficiency``."""

import sys

from llava.eval.measure.efficiency import main

if __name__ == "__main__":
    sys.exit(main())
