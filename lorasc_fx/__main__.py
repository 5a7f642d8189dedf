"""Run the command `lorasc-fx` as `python -m lorasc_fx`."""

from __future__ import annotations

import sys

from lorasc_fx.cli.app import main

sys.exit(main())
