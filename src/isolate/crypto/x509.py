"""Certificates and ECDSA as evidence uses them: read, checked along one straight chain, issued for simulations.

    >>> from isolate.crypto.x509 import P384Key, fingerprint, load, verify_chain
    >>> root, leaf = P384Key.generate(), P384Key.generate()
    >>> anchor = root.self_signed("root", not_before=0, not_after=1000)
    >>> issued = root.issue(anchor, "leaf", leaf, not_before=0, not_after=1000)
    >>> verify_chain([load(issued)[0], load(anchor)[0]], at=500)
    1000
    >>> len(fingerprint(anchor))
    32

Times are unix seconds. What is malformed or does not chain raises MalformedError with the reason; nothing of a
foreign exception's text goes into it. A chain here is what vendors of evidence issue: leaf first, root last, no
choice of path, no names to match. ``cryptography.x509.verification`` is not used because it forbids AMD's
RSA-PSS chain and the serial number 0 of its leaves, and one path for all kinds is easier to test.
"""

from __future__ import annotations

import datetime
import hashlib
import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, NameOID

from isolate.errors import MalformedError

Certificate = x509.Certificate
P384_SIGNATURE = 96  # bytes, r || s, big-endian
MAX_CERTIFICATES = 16
MAX_CERTIFICATE = 16 * 1024  # bytes of one certificate; AMD's, the largest seen, have 1.7 KiB

_UNDERSTOOD = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.EXTENDED_KEY_USAGE}
_SMALLEST_RSA = 2048
_FILTERS = threading.Lock()


def load(data: bytes) -> list[Certificate]:
    """The certificates in ``data``: one in DER, or any number up to 16 in PEM. Raises MalformedError."""
    if len(data) > MAX_CERTIFICATES * MAX_CERTIFICATE:
        raise MalformedError("the certificates are too large")
    # The filters of warnings are one list for all threads.
    with _FILTERS, warnings.catch_warnings():
        # AMD issues every VCEK with serial number 0, which RFC 5280 forbids.
        warnings.filterwarnings("ignore", "Parsed a serial number", CryptographyDeprecationWarning)
        warnings.filterwarnings("error", "Attribute's length", UserWarning)
        try:
            if b"-----BEGIN" in data:
                found = x509.load_pem_x509_certificates(data)
            else:
                found = [x509.load_der_x509_certificate(data)]
            for one in found:
                # Lazily parsed parts are read here, so that nothing later can fail on them.
                _ = one.extensions, one.subject, one.issuer, one.public_key(), one.signature_hash_algorithm
        # The parser raises ValueError and, for odd keys and extensions, half a dozen unrelated types.
        except Exception:  # noqa: BLE001
            raise MalformedError("a certificate cannot be read") from None
    if len(found) > MAX_CERTIFICATES:
        raise MalformedError(f"more than {MAX_CERTIFICATES} certificates")
    return found


def der(certificate: Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def pem(certificate: bytes) -> bytes:
    """The PEM form of a certificate in DER. Raises MalformedError."""
    return load(certificate)[0].public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: Certificate | bytes) -> bytes:
    """SHA-256 of the DER form, 32 bytes: how an anchor is named."""
    raw = certificate if isinstance(certificate, bytes) else der(certificate)
    return hashlib.sha256(raw).digest()


def subject(certificate: Certificate) -> str:
    """The common name, for a message; never a reason to trust. What could steer a terminal is a question mark."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = str(names[0].value)[:64] if names else "unnamed"
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)


@lru_cache(maxsize=256)
def issued_by(certificate: Certificate, issuer: Certificate) -> bool:
    """Whether ``issuer`` is named as the issuer and its key signed this certificate.

    Remembered by the bytes of both: a signature is good or bad for ever, and intermediates come again and again.
    """
    key = issuer.public_key()
    if not isinstance(certificate.signature_hash_algorithm, hashes.SHA256 | hashes.SHA384 | hashes.SHA512):
        return False
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _SMALLEST_RSA:
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def valid_at(certificate: Certificate, at: int) -> bool:
    """Whether ``at`` (unix seconds) lies in the certificate's validity, both ends included."""
    begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return begin <= at <= end


def _may_issue(certificate: Certificate, below: int) -> bool:
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return False
    if not basic.ca or (basic.path_length is not None and basic.path_length < below):
        return False
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True


def verify_chain(chain: Sequence[Certificate], *, at: int) -> int:
    """Check a chain, leaf first and root last; the answer is the second at which its first member expires.

    Each is signed by the next; all are valid at ``at``; all but the leaf may issue, within their path lengths; no
    critical extension is unknown. Whether the root is trusted is the caller's question, which its bytes answer:
    its signature by itself would say nothing. Raises MalformedError with the reason.
    """
    if not 1 < len(chain) <= MAX_CERTIFICATES:
        raise MalformedError("a certificate chain has between 2 and 16 members")
    for depth, certificate in enumerate(chain):
        if depth + 1 < len(chain) and not issued_by(certificate, chain[depth + 1]):
            raise MalformedError(f"certificate {subject(certificate)} is not signed by {subject(chain[depth + 1])}")
        if not valid_at(certificate, at):
            raise MalformedError(
                f"certificate {subject(certificate)} is not valid at the time of verification: "
                f"valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} "
                f"to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC"
            )
        # A root or an intermediate with k certificates between it and the leaf needs a path length of at least k.
        if depth and not _may_issue(certificate, below=depth - 1):
            raise MalformedError(f"certificate {subject(certificate)} may not issue certificates")
        if any(one.critical and one.oid not in _UNDERSTOOD for one in certificate.extensions):
            raise MalformedError(f"certificate {subject(certificate)} has an unknown critical extension")
    return min(int(one.not_valid_after_utc.timestamp()) for one in chain)


def crl_next_update(data: bytes) -> float:
    """The unix second at which a revocation list (DER) ends. Raises MalformedError. Nothing is verified."""
    try:
        ends = x509.load_der_x509_crl(data).next_update_utc
    except ValueError:
        ends = None
    if ends is None:
        raise MalformedError("this is no revocation list with an end")
    return ends.timestamp()


def verify_p384(certificate: Certificate, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` (96 bytes, r || s big-endian) over ``message`` is ES384 by the certificate's key."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return False
    if len(signature) != P384_SIGNATURE:
        return False
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    try:
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


def extension(certificate: Certificate, oid: str) -> bytes | None:
    """The raw value of an extension that this library does not know, or None."""
    try:
        value = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(oid)).value
    except x509.ExtensionNotFound:
        return None
    return value.value if isinstance(value, x509.UnrecognizedExtension) else None


class P384Key:
    """A P-384 private key that signs COSE and issues certificates: the root of simulated evidence."""

    __slots__ = ("_key",)

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> Self:
        return cls(ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def from_pem(cls, pem: bytes) -> Self:
        """Read what ``to_pem`` wrote. Raises MalformedError."""
        try:
            key = serialization.load_pem_private_key(pem, None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
            raise MalformedError("this is no P-384 private key in PEM")
        return cls(key)

    def to_pem(self) -> bytes:
        """The private key in the clear (PKCS #8): for a file that only its owner reads."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def sign(self, message: bytes) -> bytes:
        """ES384: 96 bytes, r || s big-endian."""
        r, s = decode_dss_signature(self._key.sign(message, ec.ECDSA(hashes.SHA384())))
        return r.to_bytes(48, "big") + s.to_bytes(48, "big")

    def self_signed(self, name: str, *, not_before: int, not_after: int) -> bytes:
        """A root certificate (DER) under ``name``."""
        return self._build(_name(name), _name(name), self, not_before, not_after, ca=True)

    def issue(self, own: bytes, name: str, key: P384Key, *, not_before: int, not_after: int) -> bytes:
        """A leaf certificate (DER) for ``key``, signed by this key, whose own certificate is ``own`` (DER)."""
        return self._build(load(own)[0].subject, _name(name), key, not_before, not_after, ca=False)

    def _build(
        self, issuer: x509.Name, name: x509.Name, key: P384Key, not_before: int, not_after: int, *, ca: bool
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .issuer_name(issuer)
            .subject_name(name)
            .public_key(key._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime.fromtimestamp(not_before, datetime.UTC))
            .not_valid_after(datetime.datetime.fromtimestamp(not_after, datetime.UTC))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        )
        return der(builder.sign(self._key, hashes.SHA384()))

    def __repr__(self) -> str:
        return "P384Key(hidden)"


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "isolate SIMULATED platform"),
            x509.NameAttribute(NameOID.COMMON_NAME, common[:64]),
        ]
    )
