"""Images: the deterministic layer, and the engine that runs one. Knows nothing of torch."""
