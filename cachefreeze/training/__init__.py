"""Training with FreezeOut: the loop, its settings, checkpoints, and what is told on the way."""
