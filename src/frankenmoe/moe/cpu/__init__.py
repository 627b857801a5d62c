"""Compiled products for CPUs."""
