"""Benchmarks: figures of one run, side by side, as ratios. Warmth is proven elsewhere, by counters."""
