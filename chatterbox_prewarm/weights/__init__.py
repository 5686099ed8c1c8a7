"""Checkpoints: the known variants, fetching, recording and verifying."""
