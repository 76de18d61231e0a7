"""A model, pictures and prompts in; answers and seconds out."""
