"""Tests: Data sets and images."""
