"""Prove: show in a fresh process that a start hits every cache."""
