"""What the method does, by a protocol that is fixed before the runs: `make evidence`, `make evidence-check`.

`protocol.toml` says what is run and how it is judged; `results.jsonl` holds one line a run; `docs/evidence.md` is made
from those lines alone.
"""
