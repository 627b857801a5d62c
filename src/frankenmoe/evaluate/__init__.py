"""How good a model is on text; knows nothing of how it was made."""
