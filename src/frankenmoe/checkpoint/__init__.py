"""Bytes on disk: safetensors headers, reading, computing and writing tensors, the hub; knows nothing of torch."""
