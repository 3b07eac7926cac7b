"""Proof on a CUDA device: run `python -m benchmarks.gpu.prove`; docs/gpu.md says how."""
