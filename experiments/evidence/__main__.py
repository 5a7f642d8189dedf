"""`python -m experiments.evidence`: see runner.py, which is no `__main__` since processes import what they run."""

from __future__ import annotations

import sys

from experiments.evidence.runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
