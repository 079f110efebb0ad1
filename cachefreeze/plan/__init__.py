"""Predicts what pays: when rows are kept, and how long a run takes. Pure arithmetic, no torch."""
