"""AWS Nitro attestation documents (docs/spec/evidence.md, 4.2).

    >>> from isolate.attestation.verifiers.nitro import verify
    >>> verify(b"HCLA", at=0)
    Traceback (most recent call last):
    isolate.errors.EvidenceRefused: the document is no COSE_Sign1 of four members (check 1)

The checks, in order:

1. form: an array of four, tagged 18 or untagged, nothing before or after it, the unprotected header empty;
2. header: ES384 and nothing else;
3. fields: those of the vendor's specification, each of its type and size, in any CBOR form;
4. anchor: the bundle's first certificate is the pinned root G1; what else the document brings is input;
5. chain: leaf to root, all valid at the time of verification;
6. signature: over the raw header and payload bytes, by the leaf's key;
7. time: the document was made while its leaf was valid.

A leaf lives three hours and a document can be shown again in that time: freshness is the nonce's matter. ECDSA
is malleable (r, n - s), so a document's hash is no replay key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isolate.attestation.claims import VerifiedClaims, require, verifier, vouch
from isolate.attestation.roots import PINNED
from isolate.attestation.verifiers.cose import ALGORITHM, ES384, SIGN1_TAG, decode_lenient, signed_bytes
from isolate.crypto import cbor, x509
from isolate.errors import EvidenceRefused, MalformedError

KIND = "nitro"
MAX_SIZE = 32 * 1024  # the largest real one seen has 7.5 KiB; the vendor's ceiling is 16 KiB
MAX_OPTIONAL = 1024  # bytes of public_key, user_data and nonce
MAX_BUNDLE = 8
PROTECTED = cbor.encode({ALGORITHM: ES384})
REQUIRED: dict[str, type] = {
    "module_id": str,
    "timestamp": int,  # milliseconds
    "digest": str,
    "pcrs": dict,
    "certificate": bytes,
    "cabundle": list,
}
OPTIONAL = ("public_key", "user_data", "nonce")  # absent, null or bytes


def _parts(evidence: bytes) -> list[Any]:
    try:
        parts = decode_lenient(evidence, tag=SIGN1_TAG)
    except MalformedError:
        parts = None
    shaped = isinstance(parts, list) and [type(one) for one in parts] == [bytes, dict, bytes, bytes]
    require(shaped and parts[1] == {}, 1, "form", "the document is no COSE_Sign1 of four members")
    return parts  # type: ignore[no-any-return]


def _document(payload: bytes) -> dict[str, Any]:
    try:
        document = decode_lenient(payload)
    except MalformedError:
        document = None
    require(isinstance(document, dict) and _well_formed(document), 3, "fields", "a field is not as specified")
    return document  # type: ignore[no-any-return]


def _well_formed(document: dict[str, Any]) -> bool:
    if any(type(document.get(name)) is not kind for name, kind in REQUIRED.items()):
        return False
    optional = [document.get(name) for name in OPTIONAL]
    pcrs, bundle = document["pcrs"], document["cabundle"]
    return (
        0 < len(document["module_id"]) <= 256
        and document["module_id"].isprintable()
        and 0 <= document["timestamp"] < 2**52
        and document["digest"] == "SHA384"
        and 0 < len(pcrs) <= 32
        and all(type(index) is int and 0 <= index < 32 for index in pcrs)
        and all(type(one) is bytes and len(one) == 48 for one in pcrs.values())
        and 0 < len(bundle) <= MAX_BUNDLE
        and all(type(one) is bytes for one in bundle)
        and all(one is None or (type(one) is bytes and len(one) <= MAX_OPTIONAL) for one in optional)
    )


def own_time(evidence: bytes) -> int:
    """The document's own time in unix seconds, *unverified*: a time to verify at. Raises EvidenceRefused."""
    if not 0 < len(evidence) <= MAX_SIZE:
        raise EvidenceRefused("this is no Nitro document", code="evidence_size")
    return int(_document(_parts(evidence)[2])["timestamp"]) // 1000


def _chain(document: dict[str, Any]) -> list[x509.Certificate]:
    """Leaf first; the bundle comes root first."""
    found = []
    for data in (document["certificate"], *reversed(document["cabundle"])):
        one = x509.load(data)
        if len(one) != 1 or x509.der(one[0]) != data:
            raise MalformedError("a certificate of the document is not in DER")
        found.append(one[0])
    return found


@verifier(max_size=MAX_SIZE)
def verify(
    evidence: bytes, *, at: int, anchors: Sequence[bytes] | None = None, collateral: Sequence[bytes] = ()
) -> VerifiedClaims:
    """Verify a document offline at the unix second ``at``. It brings its own chain. Raises EvidenceRefused."""
    protected, _, payload, signature = _parts(evidence)
    require(protected == PROTECTED, 2, "header", "the header asks for another algorithm than ES384, or for more")
    document = _document(payload)

    trusted = PINNED[KIND] if anchors is None else anchors
    fingerprint = x509.fingerprint(document["cabundle"][0])
    require(fingerprint in trusted, 4, "anchor", "the document is not anchored at the AWS root")

    chain = _chain(document)
    try:
        expires, problem = x509.verify_chain(chain, at=at), ""
    except MalformedError as error:
        expires, problem = 0, error.message
    require(not problem, 5, "chain", problem)

    signed = x509.verify_p384(chain[0], signed_bytes(protected, payload), signature)
    require(signed, 6, "signature", "the document's signature does not verify")

    made = document["timestamp"] // 1000
    require(x509.valid_at(chain[0], made), 7, "time", "the document was not made while its certificate was valid")

    module = document["module_id"]
    unknown = sorted(str(name)[:32] for name in set(document) - set(REQUIRED) - set(OPTIONAL))
    return vouch(
        kind=KIND,
        tier="hardware",
        product="nitro",
        measurements={f"PCR{index}": document["pcrs"][index] for index in sorted(document["pcrs"])},
        binding=document.get("user_data") or b"",
        nonce=document.get("nonce"),
        public_key=document.get("public_key") or b"",
        timestamp=made,
        expires=expires,
        platform=module.partition("-enc")[0].encode(),
        not_checked=(
            "revocation of the certificates",
            *(f"the unknown field {name!r}" for name in unknown),
        ),
    )
