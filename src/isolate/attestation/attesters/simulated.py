"""Ask the simulated platform for evidence, over the socket that it left to this child (docs/spec/evidence.md, 8.1).

    >>> import socket, threading
    >>> from isolate.attestation.attesters.simulated import SimulatedAttester, read_frame, write_frame
    >>> from isolate.attestation.evidence import Runtime
    >>> ours, theirs = socket.socketpair()
    >>> def platform():
    ...     request = read_frame(theirs)
    ...     write_frame(theirs, {"evidence": b"for " + request["nonce"]})
    >>> thread = threading.Thread(target=platform)
    >>> thread.start()
    >>> runtime = Runtime(kind="simulated", nonce=b"n", keys_digest=bytes(32), purpose="test")
    >>> SimulatedAttester(ours).attest(runtime)
    b'for n'
    >>> thread.join(), ours.close(), theirs.close()
    (None, None, None)

The child sends what is to be bound and its nonce; what is measured the platform knows, and the child cannot say.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

from isolate.attestation.evidence import MAX_EVIDENCE, Runtime
from isolate.crypto import cbor
from isolate.errors import MalformedError, UnavailableError

MAX_FRAME = MAX_EVIDENCE + 4096
TIMEOUT = 30.0  # seconds for one answer


def write_frame(sock: socket.socket, value: dict[str, Any]) -> None:
    """Send a length (4 bytes, big-endian) and the value in deterministic CBOR. Raises UnavailableError."""
    body = cbor.encode(value)
    try:
        sock.sendall(struct.pack(">I", len(body)) + body)
    except OSError as error:
        raise UnavailableError(f"the platform's socket failed: {error.strerror}") from None


def read_frame(sock: socket.socket) -> dict[str, Any]:
    """Receive such a frame: a map. Raises UnavailableError at its end, MalformedError for anything else."""
    (length,) = struct.unpack(">I", _exactly(sock, 4))
    if length > MAX_FRAME:
        raise MalformedError(f"a frame of {length} bytes, where at most {MAX_FRAME} are read")
    value = cbor.decode(_exactly(sock, length), max_size=MAX_FRAME)
    if not isinstance(value, dict):
        raise MalformedError("a frame holds a map")
    return value


def _exactly(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        try:
            piece = sock.recv(size - len(found))
        except OSError as error:
            raise UnavailableError(f"the platform's socket failed: {error.strerror or 'no answer'}") from None
        if not piece:
            raise UnavailableError("the platform closed its socket")
        found += piece
    return bytes(found)


class SimulatedAttester:
    """The child's end of the platform's socket. One request at a time."""

    kind = "simulated"

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.settimeout(TIMEOUT)

    def attest(self, runtime: Runtime) -> bytes:
        """Evidence for ``runtime``. Raises UnavailableError or MalformedError."""
        write_frame(self._socket, {"op": "attest", "user_data": runtime.binding(), "nonce": runtime.nonce})
        return bytes(cbor.check(read_frame(self._socket), {"evidence": bytes})["evidence"])
