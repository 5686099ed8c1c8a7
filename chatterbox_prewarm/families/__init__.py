"""The cache families: one module for each kind of persisted state."""
