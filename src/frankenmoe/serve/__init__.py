"""Serves models to chat programs and to a page in the browser."""
