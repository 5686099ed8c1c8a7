"""Warm states: their manifest, their signature, and whether they fit a machine."""
