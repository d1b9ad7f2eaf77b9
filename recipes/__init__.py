"""Recipes: the runs whose results are committed."""
