"""Tables of the paper: ``python -m llava.eval.tables``."""

import sys

from llava.eval.tables.command import main

if __name__ == "__main__":
    sys.exit(main())
