"""Tests: networks, and models by name."""
