"""The only place that asks torch or the system about memory, cores and disk."""
