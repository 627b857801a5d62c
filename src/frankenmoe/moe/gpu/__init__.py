"""Packed experts and grouped products for GPUs."""
