"""The server that needs no engine: transformers' own serving, with a handle around each answer."""
