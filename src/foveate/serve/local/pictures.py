"""Pictures of a request: from a data URL, or fetched from a public https address where the server allows that."""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from foveate.core import FoveateError, short
from foveate.inference.pictures import MOST_BYTES, picture_of

if TYPE_CHECKING:
    from PIL import Image

REDIRECTS = 3
SECONDS, MOST_SECONDS = 10.0, 30.0  # without a byte; for all of them
_MOVED = (301, 302, 303, 307, 308)


def read_picture(url: str, where: str, urls: bool) -> Image.Image:
    """The picture behind a URL of a request, as RGB.

    Args:
        where: what messages call it.
        urls: addresses may be fetched; data URLs always may.

    Raises:
        FoveateError: no data URL in base64, an address that is not to be fetched or fails, or no picture that
            `picture_of` takes.
    """
    if url.startswith("data:"):
        return picture_of(_decoded(url, where), where)
    if not url.startswith(("http:", "https:")):
        raise FoveateError(f"{where}: {short(repr(url))} is no data URL; send data:image/png;base64,...")
    if not urls:
        raise FoveateError(f"{where}: this server fetches no pictures; send a data URL, or start it with --allow-urls")
    return picture_of(_fetched(url, where), where)


def _decoded(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise FoveateError(f"{where}: this data URL is not in base64; send data:image/png;base64,...")
    if len(data) > MOST_BYTES * 4 // 3 + 4:
        raise FoveateError(f"{where}: a picture of {len(data) * 3 / 4e6:.1f} MB; the most is {MOST_BYTES / 1e6:.0f} MB")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FoveateError(f"{where}: this data URL is no base64: {error}") from error


def _fetched(url: str, where: str) -> bytes:
    """The bytes behind an address; each redirect is checked as the first address is."""
    for _ in range(REDIRECTS + 1):
        place = urlsplit(url)
        if place.scheme != "https" or not place.hostname or place.username or place.password:
            raise FoveateError(f"{where}: {short(repr(url))} is no plain https address, the only kind that is fetched")
        address = _public_address(place.hostname, place.port or 443, where)
        connection = _Connection(place.hostname, place.port or 443, address)
        try:
            connection.request("GET", (place.path or "/") + (f"?{place.query}" if place.query else ""))
            answer = connection.getresponse()
            if answer.status in _MOVED:
                url = urljoin(url, answer.getheader("Location") or "")
                continue
            if answer.status != 200:
                raise FoveateError(f"{where}: {place.hostname} answers with HTTP {answer.status}")
            return _within(answer, where)
        except (OSError, http.client.HTTPException) as error:
            raise FoveateError(f"{where}: {place.hostname} cannot be reached: {error}") from error
        finally:
            connection.close()
    raise FoveateError(f"{where}: more than {REDIRECTS} redirects")


def _public_address(host: str, port: int, where: str) -> str:
    """An address of the host, once all that its name stands for are public."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise FoveateError(f"{where}: {short(host)} is no known host") from error
    if not found or not all(ipaddress.ip_address(one.partition("%")[0]).is_global for one in found):
        raise FoveateError(f"{where}: {short(host)} is no public host, and no other is asked")
    return sorted(found)[0]


class _Connection(http.client.HTTPSConnection):
    """One to the address that was checked, whatever the name stands for by now; its certificate is the name's."""

    def __init__(self, host: str, port: int, address: str) -> None:
        super().__init__(host, port, timeout=SECONDS)
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock: Any = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


def _within(answer: http.client.HTTPResponse, where: str) -> bytes:
    data, latest = bytearray(), time.monotonic() + MOST_SECONDS
    while part := answer.read1(65_536):
        data += part
        if len(data) > MOST_BYTES:
            raise FoveateError(f"{where}: a picture of more than {MOST_BYTES / 1e6:.0f} MB")
        if time.monotonic() > latest:
            raise FoveateError(f"{where}: the picture has not come within {MOST_SECONDS:.0f} s")
    return bytes(data)
