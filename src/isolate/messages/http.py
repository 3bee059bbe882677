"""One POST over a Unix, TCP or TLS socket, by the standard library: all the transport that a message needs.

    >>> Address.parse("unix:/run/isolate.sock").kind, Address.parse("tls:[::1]:8443#" + "5f" * 32).port
    ('unix', 8443)

It authenticates nothing: messages are signed, and keys travel in HPKE boxes, so the courier in between may be
the operator. TLS hides digests, names and tokens from the network, and that is all that it is for. A refusal
becomes the typed error of its code (docs/spec/service.md, section 1).
"""

from __future__ import annotations

import hashlib
import http.client
import re
import secrets
import socket
import ssl
import time
from functools import lru_cache
from typing import Any, Literal, Self

from attrs import frozen

from isolate.crypto.signing import VerifyingKey
from isolate.errors import IsolateError, MalformedError, RefusedError, ServiceUnavailable, UsageError
from isolate.messages.base import MAX_MESSAGE, Answer, M, Message, Refusal, Signed

TIMEOUT = 30.0  # seconds for one request, its repetitions and its answer included
ATTEMPTS = 3  # in all, of what was surely not done
WAITS = (0.1, 0.3)  # seconds before the second and the third, less up to half of it
NOT_NOW = frozenset({"too_many", "busy"})  # codes by which a service says that it has not begun

_CODE = re.compile(r"[a-z0-9_]{1,64}")
_PIN = re.compile(r"[0-9a-f]{64}")
_HINT = "use unix:/path, tcp:host:port, tls:host:port or tls:host:port#PIN"


@frozen
class Address:
    """Where a service listens. ``host`` is the path of a Unix socket; ``pin`` is the SHA-256 (32 bytes) of the one
    certificate (DER) that a ``tls:`` address takes: without it the system's authorities and the host name decide.
    """

    kind: Literal["unix", "tcp", "tls"]
    host: str
    port: int = 0
    pin: bytes | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """``unix:/path``, ``tcp:host:port``, ``tls:host:port`` or ``tls:host:port#<64 hex digits>``.

        Raises UsageError.
        """
        scheme, _, rest = text.partition(":")
        if scheme == "unix" and rest:
            return cls("unix", rest)
        pin = None
        if scheme == "tls" and "#" in rest:
            rest, _, digits = rest.partition("#")
            if not _PIN.fullmatch(digits):
                raise UsageError(f"{text!r} is no address", hint="a pin is 64 of 0-9 a-f")
            pin = bytes.fromhex(digits)
        host, _, port = rest.rpartition(":")
        if host and port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 65536:
            if scheme == "tcp":
                return cls("tcp", host.strip("[]"), int(port))
            if scheme == "tls":
                return cls("tls", host.strip("[]"), int(port), pin)
        raise UsageError(f"{text!r} is no address", hint=_HINT)


def parse_address(address: str) -> tuple[str, str, int]:
    """Of a socket without TLS: ``unix:/path`` or ``tcp:host:port``. Raises UsageError.

    >>> parse_address("unix:/run/isolate.sock"), parse_address("tcp:127.0.0.1:8443")
    (('unix', '/run/isolate.sock', 0), ('tcp', '127.0.0.1', 8443))
    """
    found = Address.parse(address)
    if found.kind == "tls":
        raise UsageError(f"{address!r} is no address for this", hint="use unix:/path or tcp:host:port")
    return found.kind, found.host, found.port


class _Timed(socket.socket):
    """A socket with one deadline for all that it does: a timeout of each read lets a courier drip for ever."""

    deadline = 0.0

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(*arguments)

    def sendall(self, *arguments: Any) -> None:
        self.settimeout(_left(self.deadline))
        super().sendall(*arguments)


class _TimedTls(ssl.SSLSocket):
    deadline = 0.0

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(*arguments)

    def send(self, *arguments: Any) -> int:
        # sendall of this class sends in parts, each with the whole timeout.
        self.settimeout(_left(self.deadline))
        return super().send(*arguments)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def tls_context(address: Address) -> ssl.SSLContext:
    """For the client of a ``tls:`` address, who also calls ``check_pin`` before sending anything."""
    return _context(address.pin is not None)


def check_pin(address: Address, shown: bytes | None) -> None:
    """Raise RefusedError (code ``tls_refused``) where a certificate is pinned and ``shown`` (DER) is another."""
    if address.pin not in (None, hashlib.sha256(shown or b"").digest()):
        raise RefusedError(
            f"{address.host} shows another certificate than the pinned one",
            code="tls_refused",
            hint="look at the address that `isolate serve` prints",
        )


@lru_cache(maxsize=2)
def _context(pinned: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if pinned:
        # The one certificate is compared after the handshake; neither names nor authorities count.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = _TimedTls
    return context


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: Address, deadline: float) -> None:
        self._address, self._deadline = address, deadline
        super().__init__("isolate", timeout=_left(deadline))

    def connect(self) -> None:
        where = self._address
        if where.kind == "unix":
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                plain.settimeout(self.timeout)
                plain.connect(where.host)
            except BaseException:
                plain.close()
                raise
        else:
            plain = socket.create_connection((where.host, where.port), self.timeout)
        if where.kind == "tls":
            self.sock = self._secured(plain)
        else:
            self.sock = _Timed(fileno=plain.detach())
        self.sock.settimeout(_left(self._deadline))
        self.sock.deadline = self._deadline

    def _secured(self, plain: socket.socket) -> _TimedTls:
        """TLS 1.3 to the server that the address names. Raises RefusedError (code ``tls_refused``) for another."""
        where = self._address
        try:
            plain.settimeout(_left(self._deadline))
            # From here on the descriptor is the new socket's, also when the handshake fails.
            secured = tls_context(where).wrap_socket(plain, server_hostname=where.host)
        except ssl.SSLCertVerificationError:
            hint = "add the pin that `isolate serve` prints: tls:host:port#PIN"
            raise RefusedError(
                f"no authority of this system vouches for {where.host}", code="tls_refused", hint=hint
            ) from None
        finally:
            plain.close()
        try:
            check_pin(where, secured.getpeercert(binary_form=True))
        except RefusedError:
            secured.close()
            raise
        return secured  # type: ignore[return-value]


class _NotBegunError(Exception):
    """Nothing was sent: whatever was asked was not done."""


def _exchange(
    where: Address, deadline: float, method: str, path: str, body: bytes | None, most: int
) -> tuple[int, bytes]:
    """Status and body (at most one byte more than ``most``) of one request on a connection of its own."""
    connection = _Connection(where, deadline)
    try:
        try:
            connection.connect()
        except (ConnectionError, FileNotFoundError, BlockingIOError) as error:
            raise _NotBegunError(type(error).__name__) from None
        headers = {"Connection": "close"} | ({"Content-Type": "application/cbor"} if body is not None else {})
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(most + 1)
    finally:
        connection.close()


def _refusal(body: bytes) -> Refusal | None:
    try:
        return Refusal.parse(body)
    except MalformedError:
        return None


def _persist(
    address: str, method: str, path: str, body: bytes | None, most: int, timeout: float, attempts: int
) -> tuple[int, bytes]:
    """The answer to one request. What was surely not done is asked again: nobody listened, or the service said so.

    What was sent and not answered may have been done, and is never sent again. Raises ServiceUnavailable.
    """
    where, deadline = Address.parse(address), time.monotonic() + timeout
    for number in range(attempts):
        last = number + 1 == attempts or time.monotonic() >= deadline
        try:
            status, answered = _exchange(where, deadline, method, path, body, most)
            refused = _refusal(answered) if status in (429, 503) else None
            if last or refused is None or refused.code not in NOT_NOW:
                return status, answered
        except _NotBegunError as error:
            if last:
                raise ServiceUnavailable(f"no answer from {address}: {error}") from None
        # ValueError: a path with a zero byte, a host that no resolver takes.
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServiceUnavailable(f"no answer from {address}: {type(error).__name__}") from None
        wait = WAITS[min(number, len(WAITS) - 1)]
        # Less a random part, so that those who were refused together do not come back together.
        time.sleep(min(wait * (1 - secrets.randbelow(512) / 1024), _left(deadline)))
    raise UsageError("a request is made at least once")


def post(
    address: str,
    path: str,
    request: Message,
    answer: type[M],
    *,
    timeout: float = TIMEOUT,
    attempts: int = ATTEMPTS,
) -> M:
    """Send ``request`` to ``/v1/<path>`` and read an ``answer``.

    ``timeout`` (seconds) is for everything; ``attempts`` counts the first. Raises ServiceUnavailable when nothing
    answers or the service is too busy, RefusedError (code ``tls_refused``) when another answers than a ``tls:``
    address names, the typed error of a refusal, and MalformedError.
    """
    status, body = _persist(address, "POST", f"/v1/{path}", request.encode(), MAX_MESSAGE, timeout, attempts)
    if status == 200:
        return answer.parse(body)
    refusal = _refusal(body)
    if refusal is None:
        raise ServiceUnavailable(f"{address} answered with status {status}")
    raise error_of(refusal)


def fetch(address: str, path: str, *, most: int, timeout: float = TIMEOUT, attempts: int = ATTEMPTS) -> bytes:
    """GET a file of at most ``most`` bytes, which anyone may read and nobody believes before it is verified.

    Raises ServiceUnavailable, and RefusedError (code ``tls_refused``).
    """
    status, body = _persist(address, "GET", path, None, most, timeout, attempts)
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
