"""One POST over a Unix or TCP socket, by the standard library: all the transport that a message needs.

    >>> parse_address("unix:/run/isolate.sock"), parse_address("tcp:127.0.0.1:8443")
    (('unix', '/run/isolate.sock', 0), ('tcp', '127.0.0.1', 8443))

It authenticates nothing: messages are signed, and keys travel in HPKE boxes, so the courier in between may be
the operator. The answer of a refusal becomes the typed error of its code (docs/spec/service.md, section 1).
"""

from __future__ import annotations

import http.client
import socket
from typing import TypeVar

from isolate.errors import IsolateError, MalformedError, RefusedError, ServiceUnavailable, UsageError
from isolate.messages.base import MAX_MESSAGE, Message, Refusal

TIMEOUT = 30.0  # seconds for one request

M = TypeVar("M", bound=Message)


def parse_address(address: str) -> tuple[str, str, int]:
    """``unix:/path`` or ``tcp:host:port``. Raises UsageError."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest:
        return "unix", rest, 0
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdigit() and int(port) < 65536:
        return "tcp", host.strip("[]"), int(port)
    raise UsageError(f"{address!r} is no address", hint="use unix:/path or tcp:host:port")


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: str, timeout: float) -> None:
        self._kind, self._host, self._port = parse_address(address)
        super().__init__("isolate", timeout=timeout)

    def connect(self) -> None:
        if self._kind == "unix":
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._host)
        else:
            self.sock = socket.create_connection((self._host, self._port), self.timeout)


def post(address: str, path: str, request: Message, answer: type[M], *, timeout: float = TIMEOUT) -> M:
    """Send ``request`` to ``/v1/<path>`` and read an ``answer``.

    Raises ServiceUnavailable when nothing answers, the typed error of a refusal, and MalformedError.
    """
    connection = _Connection(address, timeout)
    try:
        connection.request(
            "POST", f"/v1/{path}", request.encode(), {"Content-Type": "application/cbor", "Connection": "close"}
        )
        response = connection.getresponse()
        body = response.read(MAX_MESSAGE + 1)
        status = response.status
    except (OSError, http.client.HTTPException) as error:
        raise ServiceUnavailable(f"no answer from {address}: {type(error).__name__}") from None
    finally:
        connection.close()
    if status == 200:
        return answer.parse(body)
    try:
        refusal = Refusal.parse(body)
    except MalformedError:
        raise ServiceUnavailable(f"{address} answered with status {status}") from None
    raise error_of(refusal)


def error_of(refusal: Refusal) -> IsolateError:
    """The exception for a refusal: the class whose code it is, else RefusedError."""
    kind = _by_code(IsolateError).get(refusal.code, RefusedError)
    return kind(
        refusal.message[:500], code=refusal.code[:64], hint=refusal.hint[:200], request_id=refusal.request_id[:64]
    )


def _by_code(root: type[IsolateError]) -> dict[str, type[IsolateError]]:
    found = {root.default_code: root}
    for child in root.__subclasses__():
        found |= _by_code(child)
    return found
