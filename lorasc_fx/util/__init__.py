"""Utilities that all packages use: transactions, files, fingerprints, argument checks, optional imports."""
