"""Key and certificate of the service's TLS listener: given as files, or made once and kept in the state.

    >>> key, certificate = tls.self_signed("127.0.0.1", not_before=0, not_after=2_000_000_000)
    >>> TlsIdentity.read(key + certificate).self_signed
    True

Clients compare the certificate itself with the pin in their address, so what counts is that it stays: neither its
names nor its dates do. TLS 1.3 only. It hides what the messages do not: digests, names, tokens. Messages stay
signed, and keys stay in HPKE boxes. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from attrs import field, frozen

from isolate.crypto import tls
from isolate.crypto.secret import Secret
from isolate.errors import MalformedError, NoRecipient, StorageError, UsageError
from isolate.service.state import State

LIFETIME = 3650 * 24 * 3600  # seconds: a client that pins it looks at no dates, and another key is another pin


@frozen
class TlsIdentity:
    """``pem`` is private key and certificates, ``pin`` the SHA-256 (32 bytes) of the first of these (DER)."""

    pem: bytes = field(repr=False)
    pin: bytes
    self_signed: bool

    @classmethod
    def read(cls, pem: bytes) -> TlsIdentity:
        """Raises MalformedError."""
        return cls(pem, *tls.pin(pem[pem.find(b"-----BEGIN CERTIFICATE") :]))

    def context(self) -> ssl.SSLContext:
        """For the listener. Raises UsageError when key and certificate do not go together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # a resumed session would save one signature, and keep a secret for that
        # OpenSSL reads from a path only: this one is of memory, and for this process alone.
        descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(self.pem)
            # With a password, even an empty one, OpenSSL asks for none on the terminal.
            context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")
        except (ssl.SSLError, OSError) as error:
            raise UsageError(f"this TLS key and certificate cannot be used: {type(error).__name__}") from None
        finally:
            os.close(descriptor)
        return context


def given_identity(certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> TlsIdentity:
    """Of two files in PEM: certificate (chain) and private key without a passphrase. Raises UsageError."""
    try:
        return TlsIdentity.read(Path(key).read_bytes() + b"\n" + Path(certificate).read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from None
    except MalformedError as error:
        raise UsageError(f"{certificate}: {error.message}") from None


def kept_identity(state: State, *, host: str, now: int) -> TlsIdentity:
    """The one that lies in the state, sealed as its other secrets; made, for ``host``, when there is none.

    ``host`` is a name or an IP address, ``now`` unix seconds. Raises StorageError.
    """

    def make() -> Secret:
        return Secret(b"".join(tls.self_signed(host, not_before=now - 24 * 3600, not_after=now + LIFETIME)))

    try:
        with state.secret("tls", make) as kept:
            return TlsIdentity.read(bytes(kept.expose()))
    except (MalformedError, NoRecipient):
        raise StorageError("the TLS key in the state cannot be read") from None
