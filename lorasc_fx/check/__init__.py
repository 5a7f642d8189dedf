"""Checks that a captured graph computes the same as its model: isolated executions, comparisons, and guards."""
