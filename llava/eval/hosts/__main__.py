"""Which classes of the Transformers library can be pruned: ``python -m llava.eval.hosts``."""

import sys

from llava.eval.hosts.command import main

if __name__ == "__main__":
    sys.exit(main())
