"""Benchmarks over the cases of the operators: `python -m bench --help`, `pytest bench`."""
