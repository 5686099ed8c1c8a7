"""The warm-up: run the model until everything that it needs is loaded and compiled."""
