"""The HTTP server: routes, middleware and metrics."""
