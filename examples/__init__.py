"""Runnable examples. The tests run them."""
