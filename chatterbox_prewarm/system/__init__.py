"""What the other packages build on: processes, files, locks, paths, digests, fingerprint and metrics."""
