"""Deciding what runs, without running it: pure Python and numpy, never torch."""
