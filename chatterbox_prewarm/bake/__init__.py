"""Bake: create a warm state on the machine that it is for."""
