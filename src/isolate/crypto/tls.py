"""A certificate for a TLS connection whose client knows it beforehand: of the service's listener, and what channels
are measured against.

    >>> from isolate.crypto.tls import self_signed
    >>> key, certificate = self_signed("localhost", not_before=0, not_after=4_000_000_000)
    >>> key.startswith(b"-----BEGIN PRIVATE KEY"), certificate.startswith(b"-----BEGIN CERTIFICATE")
    (True, True)

P-256 with SHA-256: what OpenSSL signs and verifies fastest, so that the other side of a comparison is at its best.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from isolate.crypto.x509 import fingerprint, load


def self_signed(name: str, *, not_before: int, not_after: int) -> tuple[bytes, bytes]:
    """A fresh key and its self-signed certificate, both PEM; times are unix seconds. The key is not encrypted.

    ``name`` is a host name or an IP address.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(not_before, UTC))
        .not_valid_after(datetime.fromtimestamp(not_after, UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([_alternative(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def pin(chain: bytes) -> tuple[bytes, bool]:
    """SHA-256 (32 bytes) of the first certificate of a PEM chain (DER), and whether it is its own issuer.

    Raises MalformedError.
    """
    first = load(chain)[0]
    return fingerprint(first), first.issuer == first.subject
