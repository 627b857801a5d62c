"""Text that experts are good at: read into documents, packed into blocks of tokens; knows nothing of models."""
