"""Checks that a captured graph computes the same as its model: runs without side effects, comparisons, and guards."""
