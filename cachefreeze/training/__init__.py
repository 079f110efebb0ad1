"""Training with FreezeOut: the loop, its settings, checkpoints, and lines on the terminal."""
