"""The lab of this repository: data, weights and the demo. No part of the installed package.

The methods, the training loop and the statistics are those of `lorasc_fx.cli` (methods, training, compare); a
configuration names what stands here as `python:experiments.data:NAME`.
"""
