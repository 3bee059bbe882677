"""Who can open a sealed file: wrapping its key for recipients, and getting it back.

    >>> from isolate.crypto.kem import Identity
    >>> from isolate.crypto.aead import Suite
    >>> from isolate.sealed.keys import FileKey, commitment
    >>> from isolate.sealed.layout import Params
    >>> identity, key = Identity.generate(), FileKey.generate()
    >>> params = Params(Suite.AEGIS_256, 1 << 20, bytes(32))
    >>> stanza, = wrap(key, [identity.recipient], params, commitment(key, params))
    >>> stanza.type, stanza.label
    ('x-wing', 'pq')

docs/spec/sealed-file.md, section 2.3. Encryption to a public key authenticates nobody: that a stanza opens says
nothing about who sealed the file.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import nacl.pwhash.argon2id
from attrs import field, frozen

from isolate.crypto import cbor
from isolate.crypto.aead import Cipher, Suite
from isolate.crypto.kdf import Label, derive
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.secret import Secret
from isolate.errors import MalformedError, NoRecipient, RolledBack, Tampered, UnauthenticatedOrigin, UsageError
from isolate.sealed.directory import PublicFacts
from isolate.sealed.header import HINT_SIZE, MAX_MEMORY, MAX_PASSES, MAX_WORK, Stanza, check_stanzas
from isolate.sealed.keys import (
    CompartmentKeys,
    FileKey,
    check_file_key,
    compartment_commitment,
    compartment_key,
)
from isolate.sealed.layout import DIRECTORY_ID, VERSION, Params

_NO_ORIGIN = "origin: nothing says who must have sealed this file"
# libsodium's "moderate": 256 MiB, three passes.
PASSPHRASE_MEMORY, PASSPHRASE_PASSES = 1 << 18, 3  # KiB, passes


@runtime_checkable
class Unlocker(Protocol):
    """Whatever can open a file: gets its public facts, answers a FileKey or CompartmentKeys, or raises."""

    def unlock(self, facts: PublicFacts) -> FileKey | CompartmentKeys: ...


@runtime_checkable
class KeyWrapper(Protocol):
    """A key that stays in a KMS or an HSM and wraps a file key of 32 bytes.

    ``label`` is symmetric, classical or pq; ``name`` says which key it is (public, 512 bytes at most). ``context``
    must be authenticated with the blob. Both raise an error of isolate.errors, and in bounded time.
    """

    label: str
    name: str

    def wrap(self, key: Secret, context: bytes) -> bytes: ...

    def unwrap(self, blob: bytes, context: bytes) -> Secret: ...


def _as_secret(text: str | Secret) -> Secret:
    return Secret(text.encode()) if isinstance(text, str) else text


@frozen(eq=False)
class Passphrase:
    """Recipient and identity at once. Argon2id over the UTF-8 bytes; alone in its file; memory in KiB.

    >>> Passphrase("correct horse battery staple")
    Passphrase(memory=262144, passes=3)
    """

    _text: Secret = field(converter=_as_secret, repr=False)
    memory: int = PASSPHRASE_MEMORY
    passes: int = PASSPHRASE_PASSES

    def __attrs_post_init__(self) -> None:
        if not len(self._text):
            raise UsageError("the passphrase is empty")
        bounded = 8 <= self.memory <= MAX_MEMORY and 1 <= self.passes <= MAX_PASSES
        if not bounded or self.memory * self.passes > MAX_WORK:
            raise UsageError("this work factor is outside what a reader accepts")

    @property
    def text(self) -> Secret:
        """What was typed, as UTF-8."""
        return self._text

    def stretch(self, salt: bytes, passes: int, memory: int) -> Secret:
        """Argon2id to 32 bytes: about half a second with the default work factor."""
        text = bytes(self._text.expose())
        return Secret(nacl.pwhash.argon2id.kdf(32, text, salt, opslimit=passes, memlimit=memory * 1024))

    def unlock(self, facts: PublicFacts) -> FileKey:
        return open_file_key(facts, self)


AnyRecipient: TypeAlias = "Recipient | Passphrase | KeyWrapper"
AnyIdentity: TypeAlias = "Identity | Passphrase | KeyWrapper | Unlocker"


def _context(params: Params, commitment: bytes) -> bytes:
    """What a stanza is bound to, so that none fits into another file."""
    parts = ["isolate/v1/sealed/stanza", VERSION, int(params.suite), params.chunk_size, params.salt, commitment]
    return cbor.encode(parts)


def hint(recipient: Recipient, salt: bytes) -> bytes:
    """8 bytes by which the holder of the recipient's public key finds its stanza, and nobody links two files."""
    return hashlib.sha256(b"isolate/v1/sealed/hint\0" + salt + recipient.raw).digest()[:HINT_SIZE]


def _passphrase_cipher(passphrase: Passphrase, context: bytes, fields: Mapping[str, Any]) -> Cipher:
    stretched = passphrase.stretch(fields["salt"], fields["passes"], fields["memory"])
    with stretched, derive(stretched, Label.SEALED_PASSPHRASE, context, fields["passes"], fields["memory"]) as key:
        return Cipher(Suite.AES_256_GCM, key)


def _wrap_one(key: FileKey, recipient: AnyRecipient, params: Params, context: bytes) -> Stanza:
    if isinstance(recipient, Recipient):
        box = recipient.seal(key.expose(), info=context)
        return Stanza({"type": "x-wing", "hint": hint(recipient, params.salt), "box": box})
    if isinstance(recipient, Passphrase):
        fields: dict[str, Any] = {
            "type": "argon2id",
            "salt": secrets.token_bytes(16),
            "passes": recipient.passes,
            "memory": recipient.memory,
        }
        # The derived key serves once: a fresh salt stands in it, so the nonce may be zero.
        fields["box"] = _passphrase_cipher(recipient, context, fields).seal(key.expose(), bytes(12))
        return Stanza(fields)
    if isinstance(recipient, KeyWrapper):
        box = recipient.wrap(key, context)
        return Stanza.parse({"type": "wrapped", "label": recipient.label, "key": recipient.name, "box": box})
    raise UsageError("a recipient is a Recipient, a Passphrase or a KeyWrapper")


def wrap(key: FileKey, recipients: Sequence[AnyRecipient], params: Params, commitment: bytes) -> tuple[Stanza, ...]:
    """One stanza for each recipient. Raises UsageError for none, a double one, or labels that do not mix."""
    context = _context(params, commitment)
    if not recipients:
        raise UsageError("a file needs a recipient, or nobody could open it")
    public = [recipient.raw for recipient in recipients if isinstance(recipient, Recipient)]
    if len(set(public)) != len(public):
        raise UsageError("a recipient stands twice")
    try:
        stanzas = tuple(_wrap_one(key, recipient, params, context) for recipient in recipients)
        check_stanzas(stanzas)
    except MalformedError as error:
        raise UsageError(error.message.removeprefix("header: ")) from None
    return stanzas


def _unwrap_one(stanza: Stanza, identity: Identity | Passphrase | KeyWrapper, facts: PublicFacts) -> Secret | None:
    params, fields = facts.slot.params, stanza.fields
    context = _context(params, facts.slot.commitment)
    if isinstance(identity, Identity):
        if stanza.type != "x-wing" or fields["hint"] != hint(identity.recipient, params.salt):
            return None
        try:
            return identity.open(fields["box"], info=context)
        except NoRecipient:
            return None
    if isinstance(identity, Passphrase):
        if stanza.type != "argon2id":
            return None
        raw = _passphrase_cipher(identity, context, fields).open(fields["box"], bytes(12))
        return None if raw is None else Secret(raw)
    if stanza.type != "wrapped" or (fields["label"], fields["key"]) != (identity.label, identity.name):
        return None
    return identity.unwrap(fields["box"], context)


def open_file_key(facts: PublicFacts, identity: Identity | Passphrase | KeyWrapper) -> FileKey:
    """The file key, checked against the commitment and the header's MAC.

    Raises NoRecipient when no stanza is this identity's, Tampered when one is and gives another key.
    """
    stage = "unlock"
    for stanza in facts.slot.stanzas:
        opened = _unwrap_one(stanza, identity, facts)
        if opened is None:
            continue
        with opened:
            if len(opened) != FileKey.size:
                raise Tampered(f"{stage}: a stanza holds no file key")
            key = FileKey(opened.expose())
        if not check_file_key(key, facts):
            raise Tampered(f"{stage}: the header does not belong to the key that it wraps")
        return key
    what = "passphrase" if isinstance(identity, Passphrase) else "identity"
    raise NoRecipient(f"{stage}: this file does not open with this {what}")


def compartment_keys(file_key: FileKey, facts: PublicFacts, ids: Sequence[str] | None = None) -> CompartmentKeys:
    """Keys for the compartments ``ids``, or for all of them and the file's metadata (id ``*``) where it is None.

    Raises UsageError for an id that the file does not have.
    """
    wanted = [DIRECTORY_ID, *facts.compartments] if ids is None else list(dict.fromkeys(ids))
    unknown = set(wanted) - {DIRECTORY_ID, *facts.compartments}
    if unknown:
        raise UsageError(f"this file has no compartment {sorted(unknown)[0][:64]!r}")
    params = facts.contents.params
    return CompartmentKeys(facts.digest, {name: compartment_key(file_key, params, name) for name in wanted})


def _ask(facts: PublicFacts, identity: AnyIdentity) -> FileKey | CompartmentKeys:
    if isinstance(identity, Identity | Passphrase | KeyWrapper):
        return open_file_key(facts, identity)
    if not isinstance(identity, Unlocker):
        raise UsageError("identity= takes an Identity, a Passphrase, a KeyWrapper or whatever has unlock(facts)")
    released = identity.unlock(facts)
    if not isinstance(released, FileKey | CompartmentKeys):
        raise UsageError("unlock(facts) answers a FileKey or CompartmentKeys")
    if isinstance(released, FileKey) and not check_file_key(released, facts):
        raise Tampered("unlock: the header does not belong to this file key")
    return released


def file_key(facts: PublicFacts, identity: AnyIdentity) -> FileKey:
    """The key of the whole file. Raises what ``open_file_key`` raises, and UsageError for a mere release."""
    released = _ask(facts, identity)
    if not isinstance(released, FileKey):
        raise UsageError("keys of compartments do not do here: the key of the whole file is needed")
    return released


def unlock(facts: PublicFacts, identity: AnyIdentity, *, origin_known: bool) -> CompartmentKeys:
    """Keys of every compartment that ``identity`` can open, each checked against its commitment.

    ``origin_known``: the caller has checked signer or digest. Without it only a release will do, since that names
    a digest itself. Raises UnauthenticatedOrigin, NoRecipient, Tampered, RolledBack (a release for another
    digest), or what the Unlocker raises.
    """
    stage = "unlock"
    if not origin_known and isinstance(identity, Identity | Passphrase | KeyWrapper):
        raise UnauthenticatedOrigin(_NO_ORIGIN)
    released = _ask(facts, identity)
    if isinstance(released, FileKey):
        if not origin_known:
            raise UnauthenticatedOrigin(_NO_ORIGIN)
        released = compartment_keys(released, facts)
    if not hmac.compare_digest(released.digest, facts.digest):
        raise RolledBack(f"{stage}: the keys were released for a file with another digest")
    rows = {row.id: row for row in facts.contents.rows}
    for name, key in released.keys.items():
        if name not in rows:
            raise Tampered(f"{stage}: a key was released for a compartment that the file does not have")
        found = compartment_commitment(key, facts.contents.params, name)
        if not hmac.compare_digest(found, rows[name].commitment):
            raise Tampered(f"{stage}: the key of compartment {name} is not the one that it commits to")
    return released
