"""`python -m lorasc_fx` is `lorasc-fx`."""

from __future__ import annotations

import sys

from lorasc_fx.cli.app import main

sys.exit(main())
