"""Probing: many heads, trained together on one pass of a frozen network."""

from cachefreeze.probing.probe import Probed, probe

__all__ = ["Probed", "probe"]
