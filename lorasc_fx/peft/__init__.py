"""Reads and writes adapters in peft's format, and reads peft's configurations."""
