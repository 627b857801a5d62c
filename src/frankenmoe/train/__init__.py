"""Trains the routers of an MoE, and more of it where asked; frozen weights stay mapped, only what learns is copied."""
