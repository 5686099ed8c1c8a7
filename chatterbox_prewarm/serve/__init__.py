"""The server: a front that answers from the first second, and a worker that holds the model."""
