"""Certificates of attested workloads: names, keys, requests, roots and what is read of them (service.md, 10).

    >>> from isolate.crypto.secret import Secret
    >>> from isolate.crypto.spiffe import Grant, LeafKey, RootKey, read_leaf, read_request, spiffe_id
    >>> root, key = RootKey(Secret(bytes(32)), b"job"), LeafKey.generate()
    >>> own = root.certificate("acme", not_before=0, not_after=1000)
    >>> grant = Grant(spiffe_id("acme", "digits/train", 3), None, "instance", b"facts", 0, 500)
    >>> leaf = read_leaf(root.issue(own, read_request(key.request()), grant))
    >>> leaf.uri, leaf.facts, leaf.public == key.public
    ('spiffe://acme/job/digits/train/rank/3', b'facts', True)

P-256 with SHA-256 throughout: what every TLS stack takes. Times are unix seconds, certificates and requests DER.
What is malformed raises MalformedError.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from hashlib import sha256
from typing import Self

from attrs import field, frozen
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret
from isolate.crypto.x509 import der, extension, load
from isolate.errors import MalformedError, UsageError

# Under an arc that anyone may use with a random GUID (88f625fb-f4fb-499d-b0f2-ba54c2eb8af9). Not 2.25.<UUID>:
# arcs above 2**31 keep Go's parser from reading the certificate at all.
FACTS_OID = "1.2.840.113556.1.8000.2554.35062.9723.62715.18845.45298.12211394.15436537.1"
MAX_REQUEST = 4096  # bytes of a certificate request; ours have 220
MAX_URI = 2048  # bytes, by the SPIFFE standard
MAX_DNS = 253

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ID = re.compile(r"spiffe://([a-z0-9._-]{1,255})/job/(.+)/rank/(0|[1-9][0-9]{0,9})")


def spiffe_id(domain: str, job: str, rank: int) -> str:
    """The name of a workload. Raises UsageError for a job that no SPIFFE path can spell."""
    segments = job.split("/")
    if not all(_SEGMENT.fullmatch(one) and one not in (".", "..") for one in segments):
        raise UsageError("a job with certificates is named by A-Z a-z 0-9 . _ -, in parts between slashes")
    name = f"spiffe://{domain}/job/{job}/rank/{rank}"
    if not _ID.fullmatch(name) or len(name) > MAX_URI:
        raise UsageError("a trust domain is 1 to 255 of a-z 0-9 . _ -, and a name has at most 2048 bytes")
    return name


def dns_name(domain: str, job: str, rank: int) -> str | None:
    """The same name for engines that compare host names: ``rank-3.train.digits.acme``; None where a part of it
    cannot be a label of DNS.

    >>> dns_name("acme", "digits/train", 3), dns_name("acme", "a_b", 0)
    ('rank-3.train.digits.acme', None)
    """
    labels = [f"rank-{rank}", *reversed(job.split("/")), *domain.split(".")]
    name = ".".join(labels)
    # A part with a dot in it would make two jobs one name.
    fits = all(_LABEL.fullmatch(one) for one in labels) and "." not in job and len(name) <= MAX_DNS
    return name if fits else None


def _time(at: int) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _name(organization: str, common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, common[:64]),
        ]
    )


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


class LeafKey:
    """The TLS key of a workload: a fresh P-256 key, made where it is used."""

    __slots__ = ("_key", "public")

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = _spki(key.public_key())

    @classmethod
    def generate(cls) -> Self:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def request(self) -> bytes:
        """A PKCS #10 request that shows possession of the key, and asks for nothing: the service names."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    def to_pem(self) -> bytes:
        """The private key in the clear (PKCS #8), as TLS libraries take it."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def __repr__(self) -> str:
        return "LeafKey(hidden)"


def read_request(data: bytes) -> bytes:
    """The public key (P-256, as SubjectPublicKeyInfo) of a request whose signature shows possession of it.

    Nothing else in the request counts: not its names, not its extensions. Raises MalformedError.
    """
    if len(data) > MAX_REQUEST:
        raise MalformedError(f"a certificate request has at most {MAX_REQUEST} bytes")
    try:
        request = x509.load_der_x509_csr(data)
        key, signed = request.public_key(), request.is_signature_valid
    # The parser raises ValueError and, for odd keys and algorithms, several unrelated types.
    except Exception:  # noqa: BLE001
        raise MalformedError("this is no certificate request") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise MalformedError("a certificate is issued for a P-256 key")
    if not signed:
        raise MalformedError("the request is not signed by its own key")
    return _spki(key)


@frozen
class Grant:
    """What a certificate says: names, the subject's common name, the facts in our extension, its validity."""

    uri: str
    dns: str | None
    common: str
    facts: bytes = field(repr=False)
    not_before: int
    not_after: int
    organization: str = "isolate"


class RootKey:
    """A root's key, derived from a secret and a context, so that a root for each job needs no store of its own."""

    __slots__ = ("_key", "public")

    def __init__(self, secret: Secret, *context: bytes | int | str) -> None:
        with derive(secret, Label.AUTHORITY_ROOT, *context, length=48) as wide:
            # 384 bits make the bias of the remainder less than 2**-128.
            number = int.from_bytes(wide.expose(), "big") % (_ORDER - 1) + 1
        self._key = ec.derive_private_key(number, ec.SECP256R1())
        self.public = _spki(self._key.public_key())

    def certificate(self, domain: str, *, not_before: int, not_after: int, organization: str = "isolate") -> bytes:
        """The self-signed root certificate (DER) of a trust domain: the same bytes each time."""
        digest = sha256(self.public).digest()
        name = _name(organization, f"{domain[:40]} {digest.hex()[:16]}")
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = (
            x509.CertificateBuilder()
            .issuer_name(name)
            .subject_name(name)
            .public_key(self._key.public_key())
            .serial_number(int.from_bytes(digest[:16], "big") | 1 << 126)
            .not_valid_before(_time(not_before))
            .not_valid_after(_time(not_after))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier(digest[:20]), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{domain}")]), critical=False
            )
        )
        return der(self._sign(builder))

    def issue(self, own: bytes, public: bytes, grant: Grant) -> bytes:
        """A certificate (DER) for ``public``, as ``read_request`` answers it; ``own`` is this root's certificate.

        For TLS, as client and as server, and for nothing else.
        """
        key = serialization.load_der_public_key(public)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise UsageError("a certificate is issued for a P-256 key")
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(grant.uri)]
        if grant.dns is not None:
            names.append(x509.DNSName(grant.dns))
        usage = x509.KeyUsage(
            digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        issuer = x509.AuthorityKeyIdentifier(sha256(self.public).digest()[:20], None, None)
        builder = (
            x509.CertificateBuilder()
            .issuer_name(load(own)[0].subject)
            .subject_name(_name(grant.organization, grant.common))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_time(grant.not_before))
            .not_valid_after(_time(grant.not_after))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(both, critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier(sha256(public).digest()[:20]), critical=False)
            .add_extension(issuer, critical=False)
            .add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier(FACTS_OID), grant.facts), critical=False
            )
        )
        return der(self._sign(builder))

    def _sign(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        try:
            return builder.sign(self._key, hashes.SHA256(), ecdsa_deterministic=True)
        except UnsupportedAlgorithm:  # an OpenSSL before 3.2: a root then differs in its signature each time
            return builder.sign(self._key, hashes.SHA256())

    def __repr__(self) -> str:
        return "RootKey(hidden)"


@frozen
class Leaf:
    """What stands in a workload's certificate. Reading it verifies nothing."""

    uri: str
    domain: str
    job: str
    rank: int
    dns: tuple[str, ...]
    facts: bytes = field(repr=False)
    not_before: int
    not_after: int
    public: bytes = field(repr=False)
    certificate: x509.Certificate = field(repr=False)


def read_leaf(data: bytes) -> Leaf:
    """Read one certificate in DER or PEM: one SPIFFE name of our form, for TLS both ways, no authority.

    Raises MalformedError.
    """
    certificates = load(data)
    if len(certificates) != 1:
        raise MalformedError("one certificate is expected")
    (certificate,) = certificates
    key, extensions = certificate.public_key(), certificate.extensions
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uses = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        raise MalformedError("this is no workload's certificate: it lacks its name or use") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    match = _ID.fullmatch(uris[0]) if len(uris) == 1 else None
    facts = extension(certificate, FACTS_OID)
    if match is not None:
        try:
            spiffe_id(match[1], match[2], int(match[3]))
        except UsageError:
            match = None
    both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    if (
        match is None
        or facts is None
        or authority
        or uses != both
        or not isinstance(key, ec.EllipticCurvePublicKey)
    ):
        raise MalformedError("this is no workload's certificate")
    return Leaf(
        uri=uris[0],
        domain=match[1],
        job=match[2],
        rank=int(match[3]),
        dns=tuple(names.get_values_for_type(x509.DNSName)),
        facts=facts,
        not_before=int(certificate.not_valid_before_utc.timestamp()),
        not_after=int(certificate.not_valid_after_utc.timestamp()),
        public=_spki(key),
        certificate=certificate,
    )


def is_root(data: bytes) -> bool:
    """Whether this is one self-signed certificate that may issue. Never raises."""
    try:
        (certificate,) = load(data)
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(certificate)
    except (MalformedError, x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        return False
    return basic.ca
