"""Container engines: Docker and podman behind one interface."""
