"""Measures how good a model is on tasks and text."""
