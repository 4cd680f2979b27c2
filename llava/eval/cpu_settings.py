"""What to choose on a CPU, in one table: ``python -m llava.eval.cpu_settings``."""

import sys

from llava.eval.measure.cpu_settings import main

if __name__ == "__main__":
    sys.exit(main())
