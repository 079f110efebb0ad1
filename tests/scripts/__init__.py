"""Tests: Scripts that users type."""
