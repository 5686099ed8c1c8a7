"""`bench report`: measure what this project claims, and write the results as a page."""
