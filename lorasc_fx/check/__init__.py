"""Whether a captured graph computes what the model does: runs without side effects, comparisons, and guards."""
