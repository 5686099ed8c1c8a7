"""Voices that users add while the server runs."""
