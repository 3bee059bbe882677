"""One POST over a Unix or TCP socket, by the standard library: all the transport that a message needs.

    >>> parse_address("unix:/run/isolate.sock"), parse_address("tcp:127.0.0.1:8443")
    (('unix', '/run/isolate.sock', 0), ('tcp', '127.0.0.1', 8443))

It authenticates nothing: messages are signed, and keys travel in HPKE boxes, so the courier in between may be
the operator. A refusal becomes the typed error of its code (docs/spec/service.md, section 1).
"""

from __future__ import annotations

import http.client
import re
import socket
import time
from typing import Any

from isolate.crypto.signing import VerifyingKey
from isolate.errors import IsolateError, MalformedError, RefusedError, ServiceUnavailable, UsageError
from isolate.messages.base import MAX_MESSAGE, Answer, M, Message, Refusal, Signed

TIMEOUT = 30.0  # seconds for one request, its answer included

_CODE = re.compile(r"[a-z0-9_]{1,64}")


def parse_address(address: str) -> tuple[str, str, int]:
    """``unix:/path`` or ``tcp:host:port``. Raises UsageError."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest:
        return "unix", rest, 0
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 65536:
        return "tcp", host.strip("[]"), int(port)
    raise UsageError(f"{address!r} is no address", hint="use unix:/path or tcp:host:port")


class _Timed(socket.socket):
    """A socket with one deadline for all that it receives: a timeout of each read lets a courier drip for ever."""

    deadline = 0.0

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(max(self.deadline - time.monotonic(), 0.001))
        return super().recv_into(*arguments)


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: str, timeout: float) -> None:
        self._kind, self._host, self._port = parse_address(address)
        self._deadline = time.monotonic() + timeout
        super().__init__("isolate", timeout=timeout)

    def connect(self) -> None:
        if self._kind == "unix":
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                plain.settimeout(self.timeout)
                plain.connect(self._host)
            except BaseException:
                plain.close()
                raise
        else:
            plain = socket.create_connection((self._host, self._port), self.timeout)
        self.sock = _Timed(fileno=plain.detach())
        self.sock.settimeout(self.timeout)
        self.sock.deadline = self._deadline


def post(address: str, path: str, request: Message, answer: type[M], *, timeout: float = TIMEOUT) -> M:
    """Send ``request`` to ``/v1/<path>`` and read an ``answer``.

    Raises ServiceUnavailable when nothing answers, the typed error of a refusal, and MalformedError.
    """
    sent = request.encode()
    connection = _Connection(address, timeout)
    try:
        connection.request("POST", f"/v1/{path}", sent, {"Content-Type": "application/cbor", "Connection": "close"})
        response = connection.getresponse()
        body = response.read(MAX_MESSAGE + 1)
        status = response.status
    # ValueError: a path with a zero byte, a host that no resolver takes.
    except (OSError, http.client.HTTPException, ValueError) as error:
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


def fetch(address: str, path: str, *, most: int, timeout: float = TIMEOUT) -> bytes:
    """GET a file of at most ``most`` bytes, which anyone may read and nobody believes before it is verified.

    Raises ServiceUnavailable.
    """
    connection = _Connection(address, timeout)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read(most + 1)
        status = response.status
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServiceUnavailable(f"no answer from {address}: {type(error).__name__}") from None
    finally:
        connection.close()
    if status != 200 or len(body) > most:
        raise ServiceUnavailable(f"{address} does not have {path} as it must be", hint="")
    return body


def ask(
    address: str, path: str, request: Signed, answer: type[M], key: VerifyingKey, *, timeout: float = TIMEOUT
) -> M:
    """Send a signed request; the answer must be signed for it by ``key``, the service's release key.

    Raises what ``post`` raises, and RefusedError (code ``forged_answer``).
    """
    return post(address, path, request, Answer, timeout=timeout).open(request, key, answer)


def error_of(refusal: Refusal) -> IsolateError:
    """The exception for a refusal: the class whose code it is, else that of its kind, else RefusedError.

    A refusal is not signed and ends on a terminal: what would not print is replaced.

    >>> str(error_of(Refusal("no code!", "one\\x1b[2J\\nline", "", "")))
    'one?[2J?line'
    """
    code = refusal.code if _CODE.fullmatch(refusal.code) else ""
    classes = _by_code(IsolateError)
    return classes.get(code, classes.get(refusal.kind, RefusedError))(
        _line(refusal.message, 500),
        code=code or None,
        hint=_line(refusal.hint, 200),
        request_id=_line(refusal.request_id, 64),
    )


def _line(text: str, most: int) -> str:
    return "".join(one if one.isprintable() else "?" for one in text[:most])


def _by_code(root: type[IsolateError]) -> dict[str, type[IsolateError]]:
    found = {root.default_code: root}
    for child in root.__subclasses__():
        found |= _by_code(child)
    return found
