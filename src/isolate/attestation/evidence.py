"""What an attester sends: evidence, and the runtime map that the evidence is bound to (docs/spec/evidence.md, 2).

    >>> from isolate.attestation.evidence import KeyDigests, Runtime, Slot
    >>> keys = KeyDigests.of({"channel": bytes(32)})
    >>> keys.check("channel", bytes(32))
    >>> runtime = Runtime(
    ...     kind="simulated", nonce=b"n" * 32, keys_digest=keys.digest, purpose="train", slot=Slot("job", 0, 1)
    ... )
    >>> Runtime.parse(runtime.encode()) == runtime, len(runtime.binding())
    (True, 64)

The binding goes into the report data of SEV-SNP and TDX and into the user data of Nitro and simulated documents.
Keys are bound by digest: an X-Wing key (1216 bytes) fits into none of them.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

from attrs import field, frozen

from isolate.crypto import cbor
from isolate.errors import EvidenceRefused, MalformedError, UsageError

PROFILE = "isolate/runtime/v1"
ENVELOPE = "isolate/evidence/v1"
DIGEST_SIZE = 32
BINDING_SIZE = 64
KEY_SIZES = {"hpke": 1216, "sign": 64, "channel": 32}  # bytes of each public key, by purpose

# Limits of this implementation. The largest real evidence seen is a Nitro document of 7.5 KiB.
MAX_EVIDENCE = 64 * 1024
MAX_COLLATERAL = 128 * 1024  # bytes of one piece; Intel's JSON, the largest seen, has 19 KiB
MAX_PIECES = 16
MAX_PARTS = 16  # GPUs beside one CPU
MAX_ENVELOPE = 4 * 1024 * 1024
MAX_RUNTIME = 16 * 1024
MAX_NONCE = 64
MAX_NAME = 128


def keys_digest(keys: Mapping[str, bytes]) -> bytes:
    """SHA-256 of {purpose: SHA-256(public key)} in deterministic CBOR, 32 bytes. Raises UsageError."""
    return KeyDigests.of(keys).digest


def instance_id(keys: bytes) -> bytes:
    """The name of an instance: SHA-256 over a label and its keys digest, 32 bytes."""
    return hashlib.sha256(b"isolate/instance/v1" + keys).digest()


def gpu_nonce(nonce: bytes, keys: bytes) -> bytes:
    """What a GPU beside the CPU must sign: SHA-256 over a label, the session's nonce and the keys digest.

    So no report of a GPU in another machine, or of another session, can be mixed in.
    """
    return hashlib.sha256(b"isolate/gpu-nonce/v1" + cbor.encode([nonce, keys])).digest()


def _frozen_map(value: Mapping[str, bytes]) -> Mapping[str, bytes]:
    return MappingProxyType({str(key): bytes(value[key]) for key in sorted(value)})


@frozen(eq=False)
class KeyDigests:
    """{purpose: SHA-256 of the public key}: what travels when the keys themselves are too long."""

    digests: Mapping[str, bytes] = field(converter=_frozen_map)

    def __attrs_post_init__(self) -> None:
        if not self.digests or any(len(one) != DIGEST_SIZE for one in self.digests.values()):
            raise MalformedError("key digests are 32 bytes each, and there is at least one")
        if set(self.digests) - set(KEY_SIZES):
            raise MalformedError("a key digest for an unknown purpose")

    @classmethod
    def of(cls, keys: Mapping[str, bytes]) -> Self:
        """From the public keys themselves. Raises UsageError for an unknown purpose or a wrong length."""
        for purpose, key in keys.items():
            if KEY_SIZES.get(purpose) != len(key):
                raise UsageError(f"no {purpose} key has {len(key)} bytes")
        if not keys:
            raise UsageError("at least one key is bound")
        return cls({purpose: hashlib.sha256(key).digest() for purpose, key in keys.items()})

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.encode()).digest()

    def check(self, purpose: str, public_key: bytes) -> None:
        """Raise EvidenceRefused unless this is the key that was attested for ``purpose``."""
        expected = self.digests.get(purpose)
        if expected is None or not hmac.compare_digest(expected, hashlib.sha256(public_key).digest()):
            raise EvidenceRefused(f"this {purpose} key is not the attested one", code="key_not_attested")

    def encode(self) -> bytes:
        return cbor.encode(dict(self.digests))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises MalformedError."""
        value = cbor.decode(data, max_size=1024)
        if not isinstance(value, dict) or any(
            not isinstance(key, str) or not isinstance(one, bytes) for key, one in value.items()
        ):
            raise MalformedError("key digests are a map of text to bytes")
        return cls(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyDigests) and dict(self.digests) == dict(other.digests)

    def __hash__(self) -> int:
        return hash(self.encode())


def _name(value: str, what: str) -> None:
    if not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise MalformedError(f"{what} is 1 to {MAX_NAME} printable characters")


@frozen
class Slot:
    """One place in a job, issued by the service for a single use: who claims it again is the next generation."""

    job: str
    rank: int
    generation: int

    def __attrs_post_init__(self) -> None:
        _name(self.job, "a job")
        if not 0 <= self.rank < 2**32 or not 0 <= self.generation < 2**63:
            raise MalformedError("a slot has a rank below 2^32 and a generation below 2^63")

    def to_value(self) -> dict[str, Any]:
        return {"job": self.job, "rank": self.rank, "generation": self.generation}

    @classmethod
    def from_value(cls, value: object) -> Self:
        """Raises MalformedError."""
        return cls(**cbor.check(value, {"job": str, "rank": int, "generation": int}))


@frozen
class Submod:
    """Evidence of a device beside the CPU (a GPU), named by the SHA-256 of its bytes."""

    kind: str
    digest: bytes

    def __attrs_post_init__(self) -> None:
        _name(self.kind, "a kind")
        if len(self.digest) != DIGEST_SIZE:
            raise MalformedError("the digest of a submodule is 32 bytes")

    @classmethod
    def of(cls, kind: str, evidence: bytes) -> Self:
        return cls(kind, hashlib.sha256(evidence).digest())


@frozen(kw_only=True)
class Runtime:
    """What the evidence is bound to: nonce, keys, purpose, slot and the devices beside the CPU."""

    profile: str = PROFILE
    kind: str
    nonce: bytes
    keys_digest: bytes
    purpose: str
    slot: Slot | None = None
    submods: tuple[Submod, ...] = ()

    def __attrs_post_init__(self) -> None:
        _name(self.kind, "a kind")
        _name(self.purpose, "a purpose")
        _name(self.profile, "a profile")
        if len(self.nonce) > MAX_NONCE:
            raise MalformedError(f"a nonce has at most {MAX_NONCE} bytes")
        if len(self.keys_digest) != DIGEST_SIZE:
            raise MalformedError("a keys digest is 32 bytes")
        if len(self.submods) > MAX_PARTS:
            raise MalformedError(f"at most {MAX_PARTS} submodules")

    def encode(self) -> bytes:
        return cbor.encode(
            {
                "profile": self.profile,
                "kind": self.kind,
                "nonce": self.nonce,
                "keys": self.keys_digest,
                "purpose": self.purpose,
                "slot": self.slot.to_value() if self.slot else None,
                "submods": [{"kind": one.kind, "digest": one.digest} for one in self.submods],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises MalformedError. Another profile is read, and then fails the appraisal."""
        fields: dict[str, type] = {
            "profile": str, "kind": str, "nonce": bytes, "keys": bytes, "purpose": str,
            "slot": object, "submods": list,
        }  # fmt: skip
        value = cbor.record(data, fields, max_size=MAX_RUNTIME)
        slot = value["slot"]
        return cls(
            profile=value["profile"],
            kind=value["kind"],
            nonce=value["nonce"],
            keys_digest=value["keys"],
            purpose=value["purpose"],
            slot=None if slot is None else Slot.from_value(slot),
            submods=tuple(Submod(**cbor.check(one, {"kind": str, "digest": bytes})) for one in value["submods"]),
        )

    def binding(self) -> bytes:
        """SHA-512("isolate/attest/v1" || encoding), 64 bytes: report data, or user data."""
        return hashlib.sha512(b"isolate/attest/v1" + self.encode()).digest()


@frozen
class Part:
    """The evidence of one device beside the CPU, with its collateral."""

    kind: str
    evidence: bytes
    collateral: tuple[bytes, ...] = ()

    def __attrs_post_init__(self) -> None:
        _name(self.kind, "a kind")
        if not 0 < len(self.evidence) <= MAX_EVIDENCE:
            raise MalformedError(f"evidence has 1 to {MAX_EVIDENCE} bytes")
        if len(self.collateral) > MAX_PIECES or any(len(one) > MAX_COLLATERAL for one in self.collateral):
            raise MalformedError(f"collateral is at most {MAX_PIECES} pieces of {MAX_COLLATERAL} bytes")

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.evidence).digest()

    def to_value(self) -> dict[str, Any]:
        return {"kind": self.kind, "evidence": self.evidence, "collateral": list(self.collateral)}

    @classmethod
    def from_value(cls, value: object) -> Self:
        """Raises MalformedError."""
        checked = cbor.check(value, {"kind": str, "evidence": bytes, "collateral": list})
        if any(not isinstance(one, bytes) for one in checked["collateral"]):
            raise MalformedError("collateral is a list of bytes")
        return cls(checked["kind"], checked["evidence"], tuple(checked["collateral"]))


@frozen
class Envelope:
    """Evidence, collateral and runtime of one attester: what the service is sent."""

    kind: str
    evidence: bytes
    collateral: tuple[bytes, ...]
    runtime: Runtime
    parts: tuple[Part, ...] = ()

    def __attrs_post_init__(self) -> None:
        if len(self.parts) > MAX_PARTS:
            raise MalformedError(f"at most {MAX_PARTS} parts")
        _ = self.main

    @property
    def main(self) -> Part:
        """The CPU's evidence in the shape of the others."""
        return Part(self.kind, self.evidence, self.collateral)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the CPU's evidence, 32 bytes: what a result names. No replay key: ECDSA is malleable."""
        return self.main.digest

    def encode(self) -> bytes:
        return cbor.encode(
            {
                "format": ENVELOPE,
                **self.main.to_value(),
                "runtime": self.runtime.encode(),
                "parts": [one.to_value() for one in self.parts],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises MalformedError."""
        fields: dict[str, type] = {
            "format": str, "kind": str, "evidence": bytes, "collateral": list, "runtime": bytes, "parts": list,
        }  # fmt: skip
        value = cbor.record(data, fields, max_size=MAX_ENVELOPE)
        if value["format"] != ENVELOPE:
            raise MalformedError("this is no evidence envelope of a known version")
        main = Part.from_value({key: value[key] for key in ("kind", "evidence", "collateral")})
        return cls(
            kind=main.kind,
            evidence=main.evidence,
            collateral=main.collateral,
            runtime=Runtime.parse(value["runtime"]),
            parts=tuple(Part.from_value(one) for one in value["parts"]),
        )
