"""Checkpoints and base models on disk: the state as tensors and JSON, read and written without running code."""
