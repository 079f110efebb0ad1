"""Probing: many heads, trained together on one pass of a frozen network."""
