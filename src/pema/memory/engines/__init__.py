"""Engines of a build: what maps the work on a group over the groups, in one process or in several."""
