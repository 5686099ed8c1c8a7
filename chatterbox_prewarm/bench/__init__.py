"""Benchmarks for users: starts, load, and the demo."""
