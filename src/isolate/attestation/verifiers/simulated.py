"""Simulated evidence: a signed document in the shape of Nitro's, under a root that protects nothing.

    >>> from isolate.attestation.verifiers.simulated import verify
    >>> verify(b"\\xa0", at=0, anchors=[])
    Traceback (most recent call last):
    isolate.errors.EvidenceRefused: the document is no COSE_Sign1 of four members (check 1)

The checks, in order (docs/spec/evidence.md, 4.1):

1. form: an array of four in deterministic CBOR, untagged, the unprotected header empty;
2. header: ES384, our media type, and the tier as a critical member, and nothing else, so that no verifier of real
   evidence takes it for its own;
3. fields: exactly the payload's fields, each of its type and size;
4. anchor: the root certificate is one of the caller's; there is no default;
5. chain: the leaf is issued by that root, both are valid at the time of verification;
6. signature: over the raw header and payload, by the leaf's key;
7. time: the document was made while its leaf was valid.
"""

from __future__ import annotations

from collections.abc import Sequence

from isolate.attestation.claims import VerifiedClaims, require, verifier, vouch
from isolate.attestation.verifiers.cose import ALGORITHM, CONTENT_TYPE, CRITICAL, ES384, signed_bytes
from isolate.crypto import cbor, x509
from isolate.errors import EvidenceRefused, MalformedError

KIND = "simulated"
MEDIA_TYPE = "application/vnd.isolate.simulated-attestation+cbor"
TIER_LABEL = -70001  # a private header label; critical, so that who does not know it must refuse
TIER = "simulated"
REGISTER_SIZE = 48
REGISTERS = 3  # 0 everything, 1 runtime (interpreter, dependencies), 2 application and its configuration
MAX_SIZE = 16 * 1024
MAX_BYTES = 1024  # of user_data and nonce, as in Nitro's documents

PROTECTED = cbor.encode(
    {ALGORITHM: ES384, CRITICAL: [TIER_LABEL], CONTENT_TYPE: MEDIA_TYPE, TIER_LABEL: TIER},
)
FIELDS: dict[str, type] = {
    "module_id": str,
    "tier": str,
    "timestamp": int,  # milliseconds, as in Nitro's documents
    "digest": str,
    "pcrs": dict,
    "debug": bool,
    "certificate": bytes,
    "cabundle": list,
    "user_data": bytes,
    "nonce": bytes,
}


def own_time(evidence: bytes) -> int:
    """The document's own time in unix seconds, *unverified*: a time to verify at. Raises EvidenceRefused."""
    try:
        return int(cbor.record(cbor.decode(evidence, max_size=MAX_SIZE)[2], FIELDS)["timestamp"]) // 1000
    except (MalformedError, TypeError, LookupError):
        raise EvidenceRefused("this is no simulated document", code="evidence_form") from None


@verifier(max_size=MAX_SIZE)
def verify(
    evidence: bytes, *, at: int, anchors: Sequence[bytes] | None = None, collateral: Sequence[bytes] = ()
) -> VerifiedClaims:
    """Verify a simulated document. ``anchors`` are fingerprints of simulated roots. Raises EvidenceRefused."""
    try:
        parts = cbor.decode(evidence, max_size=MAX_SIZE)
    except MalformedError:
        parts = None
    shaped = isinstance(parts, list) and len(parts) == 4 and [type(one) for one in parts] == _SHAPE
    require(shaped and parts[1] == {}, 1, "form", "the document is no COSE_Sign1 of four members")
    protected, _, payload, signature = parts

    require(protected == PROTECTED, 2, "header", "the header is not that of a simulated document")

    document = cbor.record(payload, FIELDS, max_size=MAX_SIZE)
    pcrs: dict[int, bytes] = document["pcrs"]
    sized = sorted(pcrs) == list(range(REGISTERS)) and all(
        type(one) is bytes and len(one) == REGISTER_SIZE for one in pcrs.values()
    )
    small = len(document["user_data"]) <= MAX_BYTES and len(document["nonce"]) <= MAX_BYTES
    named = document["tier"] == TIER and document["digest"] == "SHA384" and 0 <= document["timestamp"] < 2**52
    single = len(document["cabundle"]) == 1 and type(document["cabundle"][0]) is bytes
    require(sized and small and named and single, 3, "fields", "a field of the document is not as specified")

    root_der: bytes = document["cabundle"][0]
    fingerprint = x509.fingerprint(root_der)
    require(fingerprint in (anchors or ()), 4, "anchor", "the simulated root is not one that the policy names")

    leaf, root = _single(document["certificate"]), _single(root_der)
    try:
        expires, problem = x509.verify_chain([leaf, root], at=at), ""
    except MalformedError as error:
        expires, problem = 0, error.message
    require(not problem, 5, "chain", problem)

    signed = x509.verify_p384(leaf, signed_bytes(protected, payload), signature)
    require(signed, 6, "signature", "the document's signature does not verify")

    made = document["timestamp"] // 1000
    require(x509.valid_at(leaf, made), 7, "time", "the document was not made while its certificate was valid")
    return vouch(
        kind=KIND,
        tier="simulated",
        product="simulated",
        measurements={f"PCR{index}": pcrs[index] for index in sorted(pcrs)},
        debug=document["debug"],
        binding=document["user_data"],
        nonce=document["nonce"],
        timestamp=made,
        expires=expires,
        platform=fingerprint,
        not_checked=("the platform: a simulation protects nothing from who runs the machine",),
    )


_SHAPE = [bytes, dict, bytes, bytes]


def _single(data: bytes) -> x509.Certificate:
    found = x509.load(data)
    if len(found) != 1 or x509.der(found[0]) != data:
        raise MalformedError("one certificate in DER is expected")
    return found[0]
