"""Tests: The program: settings, runs, checkpoints, resuming."""
