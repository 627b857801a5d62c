"""Bytes on disk: reads, computes and writes safetensors, and finds sources on the hub. Does not import torch."""
