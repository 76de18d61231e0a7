"""Many rows of pictures and questions in, their answers out: each once, whatever happens in between."""
