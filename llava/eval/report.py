"""The table of a study: ``python -m llava.eval.report``."""

import sys

from llava.eval.tables.report import main

if __name__ == "__main__":
    sys.exit(main())
