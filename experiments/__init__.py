"""Data sets, comparisons, the evidence runs and the demo of this repository. Not part of the installed package.

The comparisons use the command `lorasc-fx compare`. A configuration refers to a data set here as
`python:experiments.compare_data:NAME`.
"""
