"""The base of the other packages: processes, files, locks, paths, digests, fingerprint and metrics."""
