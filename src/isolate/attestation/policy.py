"""What the owner admits, as data (docs/spec/evidence.md, 5): frozen, in TOML, named by its hash, signed.

    >>> from isolate.attestation.policy import Policy, Reference
    >>> policy = Policy(lineage="acme/train", sequence=1, references=(
    ...     Reference("trainer-1", "nitro", {"PCR0": b"\\1" * 48}, not_after=2000000000),))
    >>> Policy.from_toml(policy.to_toml()) == policy, len(policy.id)
    (True, 32)
    >>> Policy(lineage="acme/train", sequence=1, INSECURE_accept_simulated=True).id == policy.id
    False

A policy without reference values admits nothing. Several references, each with its own validity, make an upgrade
without an outage; a revoked one denies its registers from that second on, whatever else admits them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import tomllib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import attrs
from attrs import field, frozen

from isolate.attestation.plain import from_plain, to_plain
from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, SigningKey, VerifyingKey
from isolate.errors import PolicyRefused

FORMAT = "isolate/policy/v1"
MAX_POLICY = 256 * 1024
MAX_REFERENCES = 1024
MAX_LIFETIME = 300  # seconds: what a result lives at most, whatever a policy says
MAX_STALE = 3600


def _registers(value: Mapping[str, bytes]) -> Mapping[str, bytes]:
    return MappingProxyType({name: bytes(value[name]) for name in sorted(value)})


def _versions(value: Mapping[str, Mapping[str, int]]) -> Mapping[str, Mapping[str, int]]:
    return MappingProxyType({name: MappingProxyType(dict(sorted(value[name].items()))) for name in sorted(value)})


@frozen
class Reference:
    """One admitted measurement: every register named here must be equal, and at least one is named.

    Times are unix seconds: valid from ``not_before`` to before ``not_after``, denied from ``revoked_at`` on.
    """

    name: str
    kind: str
    registers: Mapping[str, bytes] = field(converter=_registers, hash=False)
    not_before: int | None = None
    not_after: int | None = None
    revoked_at: int | None = None

    def __attrs_post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or len(self.name) > 128:
            raise PolicyRefused("a reference has a printable name of at most 128 characters")
        if not self.registers:
            raise PolicyRefused(f"reference {self.name} names no register, and would admit everything")
        if any(not 16 <= len(one) <= 64 for one in self.registers.values()):
            raise PolicyRefused(f"reference {self.name}: a register is a digest of 16 to 64 bytes")

    def matches(self, registers: Mapping[str, bytes]) -> bool:
        return all(registers.get(name) == value for name, value in self.registers.items())

    def valid_at(self, at: int) -> bool:
        return (self.not_before is None or self.not_before <= at) and (
            self.not_after is None or at < self.not_after
        )

    def revoked_by(self, at: int) -> bool:
        return self.revoked_at is not None and self.revoked_at <= at


@frozen
class TrustedSigner:
    """Whose reference manifests count, for which product, from which version on."""

    product: str
    signer: str  # the text form of a VerifyingKey
    least_version: int = 0

    def __attrs_post_init__(self) -> None:
        VerifyingKey.parse(self.signer)


@frozen
class Rules:
    """What one kind of evidence must state beside its measurement. The defaults are the strict ones.

    Where a list is empty, nothing is asked of that fact, except for ``statuses`` and ``vmpls``: those facts,
    where a kind states them, must be in the list.
    """

    allow_debug: bool = False
    allow_migration: bool = False
    allow_smt: bool = False
    vmpls: tuple[int, ...] = (0,)
    least_svn: int = 0
    least_tcb: Mapping[str, Mapping[str, int]] = field(factory=dict, converter=_versions, hash=False)
    statuses: tuple[str, ...] = ("UpToDate",)
    advisories: tuple[str, ...] = ()  # tolerated ones
    signers: tuple[bytes, ...] = ()  # digests, one of which must have signed the image
    host_data: tuple[bytes, ...] = ()
    platforms: tuple[bytes, ...] = ()  # allow-list of machines
    denied_products: tuple[str, ...] = ()
    any_measurement: bool = False  # for a device whose firmware nobody here compares (nvidia-gpu)


def _rules(value: Mapping[str, Rules]) -> Mapping[str, Rules]:
    return MappingProxyType({name: value[name] for name in sorted(value)})


@frozen(kw_only=True)
class Policy:
    """Everything an appraisal compares with. ``id`` covers every field.

    ``max_age`` and ``max_skew`` (seconds) bound the evidence's own time, where it has one; ``lifetime`` is that
    of a result (seconds, at most 300), ``max_stale`` how long what is open may go on without the service.
    """

    lineage: str
    sequence: int
    references: tuple[Reference, ...] = ()
    trusted_signers: tuple[TrustedSigner, ...] = ()
    rules: Mapping[str, Rules] = field(factory=dict, converter=_rules, hash=False)
    max_age: int = 300
    max_skew: int = 60
    lifetime: int = MAX_LIFETIME
    max_stale: int = MAX_STALE
    require_nonce: bool = True
    require_submods: tuple[str, ...] = ()
    purposes: tuple[str, ...] = ()  # empty: any
    simulated_anchors: tuple[bytes, ...] = ()
    INSECURE_accept_simulated: bool = False

    def __attrs_post_init__(self) -> None:
        if not 0 < len(self.lineage) <= 128 or not self.lineage.isprintable():
            raise PolicyRefused("a policy's lineage is 1 to 128 printable characters")
        if not 0 <= self.sequence < 2**63:
            raise PolicyRefused("a policy's sequence is a whole number")
        if not 0 < self.lifetime <= MAX_LIFETIME:
            raise PolicyRefused(f"a result lives 1 to {MAX_LIFETIME} seconds")
        if min(self.max_age, self.max_skew, self.max_stale) < 0:
            raise PolicyRefused("ages and skews are not negative")
        if len(self.references) > MAX_REFERENCES:
            raise PolicyRefused(f"at most {MAX_REFERENCES} references")
        if any(len(one) != 32 for one in self.simulated_anchors):
            raise PolicyRefused("a simulated anchor is the SHA-256 of a root certificate, 32 bytes")

    def rules_for(self, kind: str) -> Rules:
        return self.rules.get(kind, _STRICT)

    def encode(self) -> bytes:
        """Deterministic CBOR of the plain form, in which bytes are hex: what ``id`` and the signature cover."""
        return cbor.encode({"format": FORMAT, **to_plain(self)})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises MalformedError or PolicyRefused."""
        return cls._from_plain(cbor.decode(data, max_size=MAX_POLICY))

    @property
    def id(self) -> bytes:
        """SHA-256 over a label and the encoding, 32 bytes."""
        return hashlib.sha256(b"isolate/policy-id/v1" + self.encode()).digest()

    def to_toml(self) -> str:
        return "\n".join(_toml_lines({"format": FORMAT, **to_plain(self)})) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read a policy file. A time may be a TOML date-time with an offset. Raises PolicyRefused."""
        if len(text) > MAX_POLICY:
            raise PolicyRefused("the policy is too large")
        try:
            value = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError):
            raise PolicyRefused("the policy is not valid TOML") from None
        return cls._from_plain(_times(value))

    @classmethod
    def _from_plain(cls, value: object) -> Self:
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise PolicyRefused(f"a policy begins with format = {FORMAT!r}")
        body = {name: one for name, one in value.items() if name != "format"}
        return from_plain(cls, body, "policy")

    def evolve(self, **changes: Any) -> Self:
        """A copy with these fields changed: another policy, with another id."""
        return attrs.evolve(self, **changes)


_STRICT = Rules()


@frozen
class SignedPolicy:
    """A policy under the owner's signature."""

    policy: Policy
    signature: bytes

    @classmethod
    def sign(cls, policy: Policy, key: SigningKey) -> Self:
        return cls(policy, key.sign(Purpose.POLICY, policy.encode()))

    def encode(self) -> bytes:
        return cbor.encode({"policy": self.policy.encode(), "signature": self.signature})

    @classmethod
    def open(
        cls, data: bytes, *, signed_by: VerifyingKey, lineage: str | None = None, least_sequence: int = 0
    ) -> Self:
        """Read and verify. Raises PolicyRefused for another signer or lineage, or a lower sequence."""
        value = cbor.record(data, {"policy": bytes, "signature": bytes}, max_size=MAX_POLICY)
        if not signed_by.verify(Purpose.POLICY, value["policy"], value["signature"]):
            raise PolicyRefused("the policy is not signed by this owner", code="policy_signature")
        signed = cls(Policy.parse(value["policy"]), value["signature"])
        signed.check(lineage=lineage, least_sequence=least_sequence)
        return signed

    def check(self, *, lineage: str | None, least_sequence: int) -> None:
        """Raise PolicyRefused for another lineage, or a sequence lower than one seen before."""
        if lineage is not None and self.policy.lineage != lineage:
            raise PolicyRefused("the policy is of another lineage", code="policy_lineage")
        if self.policy.sequence < least_sequence:
            raise PolicyRefused(
                f"policy sequence {self.policy.sequence}, where {least_sequence} was seen",
                code="policy_rolled_back",
            )


def _times(value: Any) -> Any:
    """TOML's date-times as unix seconds, everywhere."""
    if isinstance(value, dict):
        return {name: _times(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_times(one) for one in value]
    if isinstance(value, datetime.datetime):
        if value.tzinfo is None:
            raise PolicyRefused("a time in a policy needs its offset, such as Z")
        return int(value.timestamp())
    return value


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's string is TOML's basic string, but for DEL, which no printable text holds.
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(_scalar(one) for one in value)}]"
    return str(value)


def _toml_lines(value: Mapping[str, Any], path: str = "") -> list[str]:
    """The plain form as TOML: scalars first, then tables, then arrays of tables."""
    tables = {name: one for name, one in value.items() if isinstance(one, dict)}
    arrays = {n: one for n, one in value.items() if isinstance(one, list) and one and isinstance(one[0], dict)}
    lines = [
        f"{_key(name)} = {_scalar(one)}" for name, one in value.items() if name not in tables and name not in arrays
    ]
    for name, one in tables.items():
        lines += ["", f"[{path}{_key(name)}]", *_toml_lines(one, f"{path}{_key(name)}.")]
    for name, items in arrays.items():
        for item in items:
            lines += ["", f"[[{path}{_key(name)}]]", *_toml_lines(item, f"{path}{_key(name)}.")]
    return lines


def _key(name: str) -> str:
    plain = name.replace("-", "").replace("_", "").isalnum() and name.isascii()
    return name if plain else _scalar(name)
