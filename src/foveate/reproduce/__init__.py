"""The papers' tables and figures: their numbers, and what is computed and measured beside them."""
