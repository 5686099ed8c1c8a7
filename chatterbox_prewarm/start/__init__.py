"""Start: prepare the process, then attach the model and its warm state."""
