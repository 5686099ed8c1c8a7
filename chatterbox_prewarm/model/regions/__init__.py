"""Regions: parts of the model that are compiled separately."""
