"""Data sets, comparisons, the evidence runs and the demo of this repository. Not part of the installed package.

They use the methods, the training loop and the statistics of `lorasc_fx.cli`. A configuration refers to a data set here
as `python:experiments.data:NAME`.
"""
