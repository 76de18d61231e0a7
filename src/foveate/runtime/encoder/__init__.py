"""What happens inside a running vision encoder: reading, dropping and merging tokens."""
