"""The same work beside its rivals, alternated in one process; ratios out. `python -m benchmarks` is the command."""
