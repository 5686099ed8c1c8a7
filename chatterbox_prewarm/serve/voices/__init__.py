"""Voices that users add at run time."""
