"""What every package may use: transactions, files, fingerprints, checks of arguments, optional imports."""
