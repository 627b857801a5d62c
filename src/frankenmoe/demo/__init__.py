"""The whole story on parents it makes itself; knows nothing of any file from elsewhere."""
