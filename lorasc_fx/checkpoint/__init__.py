"""Reads and writes checkpoints and base models on disk. No code from a file is run."""
