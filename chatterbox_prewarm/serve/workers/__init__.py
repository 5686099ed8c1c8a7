"""Worker processes: one loaded model each."""
