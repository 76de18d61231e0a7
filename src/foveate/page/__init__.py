"""The page of a server: ask about a picture, see what was dropped, what that saved, and what was measured."""
