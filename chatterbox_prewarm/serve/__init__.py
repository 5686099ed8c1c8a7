"""Serve speech over HTTP, or inside another Python server."""
