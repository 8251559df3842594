"""Benchmarks over the public API; each prints a table and can write JSON. See README.md."""
