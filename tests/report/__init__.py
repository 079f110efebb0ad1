"""Tests: Metrics, figures and pages of a run."""
