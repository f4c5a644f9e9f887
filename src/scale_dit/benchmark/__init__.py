"""Benchmarks of the parts that a picture's time goes into."""
