"""Damaged inputs for `benchmarks/fuzz.py`: how they are made, read and judged."""
