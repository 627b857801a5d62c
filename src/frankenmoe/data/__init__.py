"""Text of the experts' domains: found, read as documents, packed into blocks of tokens."""
