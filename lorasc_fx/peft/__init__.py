"""Adapters in peft's format: its configurations and files, read and written."""
