"""`python -m experiments.evidence [run | status | page | archive | check]`."""

import sys

from experiments.evidence.runs import main

if __name__ == "__main__":  # processes that make runs import this module, too
    sys.exit(main(sys.argv[1:]))
