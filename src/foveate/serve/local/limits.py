"""What one server takes on: bytes, pictures, tokens, requests that wait, seconds."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.core import FoveateError


@dataclass(frozen=True)
class Limits:
    """Every bound of a server; a request beyond one is refused before work starts.

    Attributes:
        max_body: bytes of a request.
        max_images: in one request.
        max_prompt_tokens: tokens of a prompt, before pruning; None leaves the model's context as the only bound.
        max_new_tokens: tokens of an answer, and what a request gets that does not say.
        queue: requests that wait while one is answered.
        timeout: from a request's arrival to its last byte.
        allow_urls: pictures may be fetched from public https addresses.
    """

    max_body: int = 32_000_000
    max_images: int = 16
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 512
    queue: int = 64
    timeout: float = 300.0
    allow_urls: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_body", 1), ("max_images", 0), ("max_new_tokens", 1), ("queue", 0)):
            if getattr(self, name) < least:
                raise FoveateError(f"{name}={getattr(self, name)} leaves nothing to serve; the smallest is {least}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise FoveateError(f"max_prompt_tokens={self.max_prompt_tokens} leaves no prompt; the smallest is 1")
        if not self.timeout > 0:
            raise FoveateError(f"timeout={self.timeout:g} leaves no time for an answer; give more than 0")
