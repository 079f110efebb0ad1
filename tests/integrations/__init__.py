"""Tests: Other trainers."""
