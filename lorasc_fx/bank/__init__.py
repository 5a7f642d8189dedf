"""A bank of adapters on one base: `AdapterBank`."""

from lorasc_fx.bank.bank import AdapterBank

__all__ = ["AdapterBank"]
