"""Tests: What pays, predicted from measured costs."""
