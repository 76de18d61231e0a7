"""The proving ground: pictures whose every object is known, questions about them, and the `mini` model."""
