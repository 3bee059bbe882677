"""Checkpoints: the log's size and root as a C2SP signed note, with room for witnesses (docs/spec/log.md, 3).

    >>> from isolate.crypto.signing import SigningKey
    >>> key, witness = SigningKey.generate(), SigningKey.generate()
    >>> public = key.verifying_key.ed25519
    >>> note = sign_checkpoint(key, "example.com/log", 0, merkle.EMPTY_ROOT)
    >>> note.splitlines()[:2]
    ['example.com/log', '0']
    >>> seen = Checkpoint.verify(note, "example.com/log", public)
    >>> note = cosign(seen, witness, "example.com/witness", at=1_700_000_000)
    >>> watch = Witness("example.com/witness", witness.verifying_key.ed25519)
    >>> Checkpoint.verify(note, "example.com/log", public, witnesses=[watch], quorum=1).witnessed
    {'example.com/witness': 1700000000}

A size is a count of leaves, a root 32 bytes, a time unix seconds. Everything hostile ends in LogRefused.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256

from attrs import field, frozen

from isolate.crypto import merkle
from isolate.crypto.signing import ED25519_SIGNATURE, SigningKey, is_public_key, verify_note
from isolate.errors import LogRefused, UsageError

ED25519 = 0x01  # signature types of C2SP signed-note
COSIGNATURE = 0x04

MAX_NOTE = 64 * 1024  # bytes; room for a hundred witnesses, post-quantum ones too
MAX_SIGNATURES = 64  # the specification asks for at least 16
MAX_TIME = 2**63 - 1

# Stricter than C2SP, which takes any character but spaces and plus: no two names then look alike.
_NAME = re.compile(r"[!-*,-~]{1,200}")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_DASH = "\u2014 "

_MADE_HERE = object()


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError("a log's or witness's name is 1 to 200 visible ASCII characters without plus")
    return name


def _key_id(name: str, kind: int, public: bytes) -> bytes:
    return sha256(name.encode() + b"\n" + bytes([kind]) + public).digest()[:4]


def _line(name: str, kind: int, public: bytes, signature: bytes) -> str:
    raw = _key_id(name, kind, public) + signature
    return f"{_DASH}{name} {base64.b64encode(raw).decode()}\n"


def _unbase64(text: str) -> bytes | None:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if base64.b64encode(raw).decode() == text else None


def verifier_key(name: str, public: bytes, kind: int = ED25519) -> str:
    """The key as other tools of C2SP take it: ``name+keyid+base64(type || key)``."""
    body = base64.b64encode(bytes([kind]) + public).decode()
    return f"{_check_name(name)}+{_key_id(name, kind, public).hex()}+{body}"


@frozen
class Witness:
    """Somebody who watches the log: a name and an Ed25519 public key (32 bytes) used for nothing else."""

    name: str
    public: bytes

    def __attrs_post_init__(self) -> None:
        _check_name(self.name)
        if not is_public_key(self.public):
            raise UsageError(f"the key of witness {self.name} is no Ed25519 public key")

    @classmethod
    def parse(cls, text: str) -> Witness:
        """Read a witness's verifier key, ``name+keyid+base64(4 || key)``. Raises UsageError."""
        name, _, rest = text.partition("+")
        raw = _unbase64(rest.partition("+")[2])
        if raw is None or len(raw) != 33 or verifier_key(name, raw[1:], COSIGNATURE) != text:
            raise UsageError(
                "this is no verifier key of a witness", hint="NAME+KEYID+KEY, of the type for cosignatures"
            )
        return cls(name, raw[1:])


def _body(origin: str, size: int, root: bytes) -> str:
    return f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"


def sign_checkpoint(key: SigningKey, origin: str, size: int, root: bytes) -> str:
    """The signed note that says: the log ``origin`` has ``size`` leaves and this root. Raises UsageError."""
    if not 0 <= size <= merkle.MAX_SIZE or len(root) != merkle.HASH_SIZE:
        raise UsageError("a checkpoint takes a size of 0 to 2**62 and a root of 32 bytes")
    body = _body(_check_name(origin), size, root)
    signature = key.sign_note(body.encode())
    return f"{body}\n{_line(origin, ED25519, key.verifying_key.ed25519, signature)}"


def _split(text: str | bytes) -> tuple[str, list[tuple[str, bytes]]]:
    """The text of a note, and (name, key id and signature) of each of its signature lines."""
    if len(text) > MAX_NOTE:
        raise LogRefused(f"a checkpoint of {len(text)} bytes, where at most {MAX_NOTE} are read")
    try:
        note = text if isinstance(text, str) else bytes(text).decode()
        note.encode()
    except UnicodeError:
        raise LogRefused("the checkpoint is not UTF-8") from None
    if any(character < " " and character != "\n" for character in note):
        raise LogRefused("the checkpoint has control characters")
    body, separator, signatures = note.rpartition("\n\n")
    lines = signatures.split("\n")
    if not separator or lines.pop() or not 1 <= len(lines) <= MAX_SIGNATURES:
        raise LogRefused(f"the checkpoint is no note with 1 to {MAX_SIGNATURES} signatures")
    parsed: list[tuple[str, bytes]] = []
    for line in lines:
        name, space, encoded = line.removeprefix(_DASH).partition(" ")
        raw = _unbase64(encoded)
        if not line.startswith(_DASH) or not name or not space or raw is None or len(raw) < 5:
            raise LogRefused("a signature line of the checkpoint is malformed")
        parsed.append((name, raw))
    return body + "\n", parsed


@frozen
class Checkpoint:
    """What a log said of itself, verified: made only by ``Checkpoint.verify``.

    ``text`` is the whole note as it came (to keep and to hand on), ``body`` what was signed, ``witnessed`` the
    time at which each known witness cosigned.
    """

    origin: str
    size: int
    root: bytes
    text: str = field(repr=False)
    body: str = field(repr=False)
    witnessed: Mapping[str, int]
    _made: object = field(repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self._made is not _MADE_HERE:
            raise UsageError("a Checkpoint is made by Checkpoint.verify only")
        # Not kept, so that attrs.evolve cannot make another one of it.
        object.__setattr__(self, "_made", None)

    @classmethod
    def verify(
        cls,
        text: str | bytes,
        origin: str,
        public: bytes,
        *,
        witnesses: Sequence[Witness] = (),
        quorum: int = 0,
    ) -> Checkpoint:
        """Read a note and verify it, or raise LogRefused.

        1. It is a signed note, within the limits.
        2. It carries the signature of ``public`` (Ed25519, 32 bytes) under the name ``origin``.
        3. No signature in it that claims a known key, the log's or a witness's, is false.
        4. At least ``quorum`` of ``witnesses`` cosigned it.
        5. Its lines are this origin, a size and a root; extension lines are not empty.
        """
        if quorum < 0 or quorum > len({witness.public for witness in witnesses}):
            raise UsageError(f"a quorum of {quorum} of {len(witnesses)} witnesses cannot be met")
        body, signatures = _split(text)  # 1
        message = body.encode()
        signed = False
        witnessed: dict[str, int] = {}
        keys: set[bytes] = set()
        log_id = _key_id(origin, ED25519, public)
        watch = {(one.name, _key_id(one.name, COSIGNATURE, one.public)): one for one in witnesses}
        for name, raw in signatures:
            key_id, signature = raw[:4], raw[4:]
            if name == origin and key_id == log_id:  # 2
                if not verify_note(public, message, signature):
                    raise LogRefused("the signature of the log on its checkpoint is false")
                signed = True
            elif (witness := watch.get((name, key_id))) is not None:  # 3
                at = int.from_bytes(signature[:8], "big")
                statement = f"cosignature/v1\ntime {at}\n".encode() + message
                if len(signature) != 8 + ED25519_SIGNATURE or at > MAX_TIME:
                    raise LogRefused(f"the cosignature of {name} is malformed")
                if not verify_note(witness.public, statement, signature[8:]):
                    raise LogRefused(f"the cosignature of {name} is false")
                witnessed[name] = max(at, witnessed.get(name, 0))
                keys.add(witness.public)
        if not signed:
            raise LogRefused("the checkpoint is not signed by the log's key", hint="is this the log you mean?")
        if len(keys) < quorum:  # 4
            raise LogRefused(f"{len(keys)} known witnesses cosigned the checkpoint, {quorum} are asked for")
        first, size, root = cls._lines(body)  # 5
        if first != origin:
            raise LogRefused("the checkpoint is of another log")
        note = text if isinstance(text, str) else bytes(text).decode()
        return cls(origin, size, root, note, body, witnessed, _MADE_HERE)

    @staticmethod
    def _lines(body: str) -> tuple[str, int, bytes]:
        lines = body.split("\n")
        if len(lines) < 4 or not all(lines[:-1]):
            raise LogRefused("the checkpoint lacks its origin, size or root")
        root = _unbase64(lines[2])
        if not _SIZE.fullmatch(lines[1]) or int(lines[1]) > merkle.MAX_SIZE:
            raise LogRefused("the size in the checkpoint is malformed")
        if root is None or len(root) != merkle.HASH_SIZE:
            raise LogRefused("the root in the checkpoint is malformed")
        size = int(lines[1])
        if size == 0 and root != merkle.EMPTY_ROOT:
            raise LogRefused("the checkpoint of an empty log has another root than the empty tree")
        return lines[0], size, root


def cosign(checkpoint: Checkpoint, key: SigningKey, name: str, *, at: int) -> str:
    """The note with a witness's line added: "at this time, this is the largest consistent tree that I saw".

    A witness calls this only for what its LogMemory has accepted. ``at`` is in unix seconds.
    """
    if not 0 <= at <= MAX_TIME:
        raise UsageError("a cosignature's time is 0 to 2**63 - 1 seconds")
    public = key.verifying_key.ed25519
    signature = key.sign_note(f"cosignature/v1\ntime {at}\n{checkpoint.body}".encode())
    return checkpoint.text + _line(_check_name(name), COSIGNATURE, public, at.to_bytes(8, "big") + signature)
