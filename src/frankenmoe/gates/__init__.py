"""Routers for an MoE: what its routers will read (capture), how rows are made of it (methods), the stage (run)."""
