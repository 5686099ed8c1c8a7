"""The developers' benchmarks: run them with `python -m benchmarks`. They are not part of the wheel."""
