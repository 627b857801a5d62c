"""Trains the routers of an MoE and, on request, other parts. Only weights that learn are copied into memory."""
