"""`python -m benchmarks.coverage [NAME...]`."""

import sys

from benchmarks.coverage.page import main

if __name__ == "__main__":
    main(sys.argv[1:])
