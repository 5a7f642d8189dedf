"""Data sets, comparisons, the evidence runs and the demo of this repository. Not part of the installed package."""
