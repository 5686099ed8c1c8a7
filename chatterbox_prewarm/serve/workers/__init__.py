"""Worker processes with one loaded model each, and the code that starts, feeds and replaces them."""
