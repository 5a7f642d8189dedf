"""Utilities for all packages: transactions, fingerprints, argument checks, optional imports, private names of torch."""
