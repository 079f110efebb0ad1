"""Tests: FreezeOut: schedule, units, scheduler."""
