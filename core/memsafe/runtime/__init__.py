"""Carrying plans out: torch, memory, threads, disk."""
