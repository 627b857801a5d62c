"""The model card of an artifact, and its upload to the hub."""
