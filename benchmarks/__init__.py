"""Benchmarks: memsafe against its peers, on the same texts and models, in turn. See docs/benchmarks.md."""
