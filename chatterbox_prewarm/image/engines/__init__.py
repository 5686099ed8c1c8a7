"""Container engines: Docker and podman."""
