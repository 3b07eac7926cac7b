"""Attention over packed and padded rows, registered with transformers."""
