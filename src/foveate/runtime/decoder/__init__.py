"""What happens inside a running decoder and on its cache."""
