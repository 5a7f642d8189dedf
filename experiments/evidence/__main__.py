"""`python -m experiments.evidence`: calls runner.py, a separate module because worker processes import it."""

from __future__ import annotations

import sys

from experiments.evidence.runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
