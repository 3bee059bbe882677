"""The result of an appraisal, as others carry it: an EAR token (draft-ietf-rats-ear), JWT, EdDSA only.

docs/spec/evidence.md, 7. A relying party checks, in order:

1. form: three canonical base64url parts, at most 8 KiB;
2. header: exactly ours, so the algorithm is fixed by whose key verifies, never by the token;
3. signature: by the issuer's Ed25519 key;
4. claims: exactly our fields, each of its type; profile known;
5. time: issued at most 30 s ahead of ``now``, living at most 300 s, and not expired;
6. names: the instance is the hash of the keys digest;
7. tier: a hardware result is affirming; a simulated one never is, and needs INSECURE_accept_simulated here too.

    >>> from isolate.attestation.result import verify
    >>> verify("eyJ.eyJ.eyJ", issuer_key=bytes(32), now=0)
    Traceback (most recent call last):
    isolate.errors.ResultRefused: the result token is malformed (check 1)
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Literal, NoReturn

import jwt
from attrs import frozen
from jwt.algorithms import Algorithm

from isolate.attestation.appraisal import Appraisal, Mode
from isolate.attestation.evidence import Slot, instance_id
from isolate.attestation.policy import MAX_LIFETIME
from isolate.crypto.signing import SigningKey, verify_token
from isolate.errors import MalformedError, ResultRefused, UsageError

PROFILE = "tag:github.com,2023:veraison/ear"
HEADER = {"alg": "EdDSA", "typ": "JWT"}
MAX_TOKEN = 8192  # bytes
MAX_AHEAD = 30  # seconds between the clocks of issuer and relying party
SUBMOD = "isolate"

# AR4SI trustworthiness values, per kind of evidence: 2 affirming, 97 hardware not genuine, 96 memory visible.
_HARDWARE = {"instance-identity": 2, "configuration": 2, "executables": 2, "hardware": 2, "runtime-opaque": 2}
_SIMULATED = {"instance-identity": 2, "configuration": 2, "executables": 2, "hardware": 97, "runtime-opaque": 96}
_STATUS = {"hardware": "affirming", "simulated": "contraindicated"}
_VECTORS = {"hardware": _HARDWARE, "simulated": _SIMULATED}


@frozen(init=False)
class AttestationResult:
    """What the issuer vouches for. Only ``verify`` makes one.

    instance (32 bytes, the name of the enclave), keys_digest (32), policy_id (32), lineage and sequence of the
    policy, nonce, evidence_digest (32), slot or None, purpose, kind and tier of the evidence, ``measurement``
    (the name of the reference), issuer, issued and expires (unix seconds), submods (kinds of devices).
    """

    instance: bytes
    keys_digest: bytes
    policy_id: bytes
    lineage: str
    sequence: int
    nonce: bytes
    evidence_digest: bytes
    slot: Slot | None
    purpose: str
    kind: str
    tier: Literal["simulated", "hardware"]
    measurement: str
    issuer: str
    issued: int
    expires: int
    submods: tuple[str, ...]

    def __init__(self, *_: object, **__: object) -> None:
        raise UsageError("an AttestationResult is made by verify() only")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("an AttestationResult does not travel: send the token")


class _EdDSA(Algorithm):
    """PyJWT's seam: our keys and libsodium's verification, which refuses the small-order keys OpenSSL takes."""

    def prepare_key(self, key: Any) -> Any:
        return key

    def sign(self, msg: bytes, key: SigningKey) -> bytes:
        return key.sign_token(msg)

    def verify(self, msg: bytes, key: bytes, sig: bytes) -> bool:
        return verify_token(key, msg, sig)

    @staticmethod
    def to_jwk(key_obj: Any, as_dict: bool = False) -> Any:
        raise UsageError("keys are not exported as JWK")

    @staticmethod
    def from_jwk(jwk: Any) -> Any:
        raise UsageError("keys are not imported as JWK")


_JWS = jwt.PyJWS(algorithms=[])
_JWS.register_algorithm("EdDSA", _EdDSA())


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    """The bytes behind canonical base64url without padding. Raises MalformedError."""
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise MalformedError("not base64url") from None
    if _text(raw) != text:
        raise MalformedError("not canonical base64url")
    return raw


def issue(
    appraisal: Appraisal,
    *,
    key: SigningKey,
    issuer: str,
    now: int,
    lifetime: int = MAX_LIFETIME,
    slot: Slot | None = None,
) -> str:
    """A token for an accepted LIVE appraisal; it lives at most 300 s, and no longer than the policy says.

    ``slot`` is what the service gave this instance; where the runtime map names one, it is that one. Raises
    AppraisalRefused for a refused appraisal, UsageError for a replayed one or another slot.
    """
    appraisal.require()
    envelope, claims = appraisal.envelope, appraisal.claims
    if envelope is None or claims is None or not appraisal.accepted:
        raise UsageError("this appraisal accepted nothing")
    if appraisal.mode is not Mode.LIVE:
        raise UsageError("a replayed record gives no result")
    if not 0 < lifetime <= MAX_LIFETIME:
        raise UsageError(f"a result lives 1 to {MAX_LIFETIME} seconds")
    runtime = envelope.runtime
    if runtime.slot is not None and slot not in (None, runtime.slot):
        raise UsageError("the runtime map names another slot")
    slot = slot or runtime.slot
    tiers = {claims.tier, *(one.tier for one in appraisal.parts)}
    tier = "simulated" if "simulated" in tiers else "hardware"
    body = {
        "eat_profile": PROFILE,
        "iss": issuer,
        "iat": now,
        "exp": now + min(lifetime, appraisal.policy.lifetime),
        "eat_nonce": _text(runtime.nonce),
        "ear.verifier-id": {"developer": "isolate", "build": "isolate/v1"},
        "cnf": {"isolate.keys-digest": _text(runtime.keys_digest)},
        "submods": {
            SUBMOD: {
                "ear.status": _STATUS[tier],
                "ear.trustworthiness-vector": _VECTORS[tier],
                "ear.appraisal-policy-id": _text(appraisal.policy.id),
                "isolate.lineage": appraisal.policy.lineage,
                "isolate.sequence": appraisal.policy.sequence,
                "isolate.instance": _text(instance_id(runtime.keys_digest)),
                "isolate.evidence-digest": _text(envelope.digest),
                "isolate.kind": claims.kind,
                "isolate.tier": tier,
                "isolate.measurement": appraisal.reference,
                "isolate.purpose": runtime.purpose,
                "isolate.slot": None if slot is None else slot.to_value(),
                "isolate.submods": [one.kind for one in appraisal.parts],
            }
        },
    }
    payload = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
    return _JWS.encode(payload, key, algorithm="EdDSA", headers={"typ": HEADER["typ"]})  # type: ignore[arg-type]


_TOP: dict[str, type] = {
    "eat_profile": str, "iss": str, "iat": int, "exp": int, "eat_nonce": str, "ear.verifier-id": dict,
    "cnf": dict, "submods": dict,
}  # fmt: skip
_CLAIMS: dict[str, type] = {
    "ear.status": str, "ear.trustworthiness-vector": dict, "ear.appraisal-policy-id": str,
    "isolate.lineage": str, "isolate.sequence": int, "isolate.instance": str, "isolate.evidence-digest": str,
    "isolate.kind": str, "isolate.tier": str, "isolate.measurement": str, "isolate.purpose": str,
    "isolate.slot": object, "isolate.submods": list,
}  # fmt: skip


def _require(condition: bool, number: int, code: str, reason: str) -> None:
    if not condition:
        raise ResultRefused(f"{reason} (check {number})", code=f"result_{code}")


def _fields(value: object, fields: dict[str, type]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(fields):
        raise MalformedError("fields")
    if any(type(value[name]) is not kind and kind is not object for name, kind in fields.items()):
        raise MalformedError("fields")
    return value


def verify(
    token: str, *, issuer_key: bytes, now: int, INSECURE_accept_simulated: bool = False
) -> AttestationResult:
    """Check a token, offline. ``issuer_key`` is an Ed25519 public key (32 bytes), ``now`` unix seconds.

    Raises ResultRefused with the reason and a code ``result_...``.
    """
    formed = isinstance(token, str) and len(token) <= MAX_TOKEN and token.isascii()
    _require(formed, 1, "malformed", "the result token is malformed")
    try:
        header, payload, _ = map(_bytes, token.split("."))
        shape, value = json.loads(header), json.loads(payload)
    # json raises ValueError, and RecursionError for deep nesting; split into other than three, ValueError.
    except (ValueError, RecursionError, MalformedError):
        raise ResultRefused("the result token is malformed (check 1)", code="result_malformed") from None
    _require(shape == HEADER, 2, "header", "the result token has another algorithm or header")
    try:
        _JWS.decode(token, issuer_key, algorithms=["EdDSA"])
        signed = True
    except jwt.PyJWTError:
        signed = False
    _require(signed, 3, "signature", "the result token is not signed by this issuer")
    try:
        result, status = _read(value)
    except MalformedError:
        raise ResultRefused("the result's claims are not ours (check 4)", code="result_claims") from None
    _require(value["eat_profile"] == PROFILE, 4, "claims", "the result is of another profile")
    return _admit(result, status, now, INSECURE_accept_simulated)


def _admit(result: AttestationResult, status: str, now: int, insecure: bool) -> AttestationResult:
    lives = 0 < result.expires - result.issued <= MAX_LIFETIME
    _require(lives, 5, "lifetime", "the result lives too long")
    _require(result.issued <= now + MAX_AHEAD, 5, "time", "the result is from the future")
    _require(now < result.expires, 5, "expired", "the result has expired")
    _require(
        result.instance == instance_id(result.keys_digest), 6, "instance", "the instance is not that of the keys"
    )
    _require(result.tier == "hardware" or insecure, 7, "simulated", "the result is of simulated evidence")
    _require(status == _STATUS[result.tier], 7, "status", "the status does not fit the tier")
    return result


def _read(value: object) -> tuple[AttestationResult, str]:
    """The claims as a value, with the status. Raises MalformedError."""
    top = _fields(value, _TOP)
    claims = _fields(_fields(top["submods"], {SUBMOD: dict})[SUBMOD], _CLAIMS)
    keys = _fields(top["cnf"], {"isolate.keys-digest": str})["isolate.keys-digest"]
    if claims["isolate.tier"] not in _STATUS or any(type(one) is not str for one in claims["isolate.submods"]):
        raise MalformedError("claims")
    slot = claims["isolate.slot"]
    digests = {
        "instance": claims["isolate.instance"],
        "keys_digest": keys,
        "policy_id": claims["ear.appraisal-policy-id"],
        "evidence_digest": claims["isolate.evidence-digest"],
    }
    raw = {name: _bytes(one) for name, one in digests.items()}
    if any(len(one) != 32 for one in raw.values()):
        raise MalformedError("a digest is 32 bytes")
    result = AttestationResult.__new__(AttestationResult)
    result.__attrs_init__(
        **raw,
        lineage=claims["isolate.lineage"],
        sequence=claims["isolate.sequence"],
        nonce=_bytes(top["eat_nonce"]),
        slot=None if slot is None else Slot.from_value(slot),
        purpose=claims["isolate.purpose"],
        kind=claims["isolate.kind"],
        tier=claims["isolate.tier"],
        measurement=claims["isolate.measurement"],
        issuer=top["iss"],
        issued=top["iat"],
        expires=top["exp"],
        submods=tuple(claims["isolate.submods"]),
    )
    return result, claims["ear.status"]
