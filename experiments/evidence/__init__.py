"""Measures the method by a protocol that was fixed before the runs: `make evidence`, `make evidence-check`.

`protocol.toml` defines the runs and how they are judged. `results.jsonl` has one line per run. `docs/evidence.md` is
computed only from these lines.
"""
