"""`bench report`: measure the claims of this project, and write the results as a page."""
