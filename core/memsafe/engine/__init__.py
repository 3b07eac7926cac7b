"""Threads, queues and locks: what carries out what planning decides."""
