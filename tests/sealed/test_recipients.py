"""Who can open a file: several recipients, passphrases, key wrappers, labels that do not mix, and rewrap."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import Identity, KeyWrapper, SigningKey, sealed
from isolate.crypto.aead import Cipher, Suite
from isolate.crypto.secret import Secret
from isolate.errors import (
    MalformedError,
    NoRecipient,
    RefusedError,
    ServiceUnavailable,
    StorageError,
    Tampered,
    UsageError,
)
from isolate.sealed import layout
from isolate.sealed.recipients import Unlocker, hint
from isolate.sealed.stores import MemorySink, MemorySource

Seal = Callable[..., bytes]
MODEL = {"w": np.arange(10)}


def passphrase(text: str = "correct horse", **work: int) -> sealed.Passphrase:
    """With the least work, so that tests are quick."""
    return sealed.Passphrase(text, **({"memory": 8, "passes": 1} | work))


class Vault:
    """A key wrapper in memory: AES-GCM under a key that never leaves it, the context as associated data."""

    def __init__(self, label: str = "symmetric", name: str = "vault/1") -> None:
        self.label, self.name = label, name
        self._cipher = Cipher(Suite.AES_256_GCM, Secret(name.encode().ljust(32, b".")))

    def wrap(self, key: Secret, context: bytes) -> bytes:
        return self._cipher.seal(key.expose(), bytes(12), context)

    def unwrap(self, blob: bytes, context: bytes) -> Secret:
        opened = self._cipher.open(blob, bytes(12), context)
        if opened is None:
            raise Tampered("the vault does not open this")
        return Secret(opened)


class BrokenVault(Vault):
    def unwrap(self, blob: bytes, context: bytes) -> Secret:
        raise ServiceUnavailable("the vault does not answer")


class LyingVault(Vault):
    """Answers another key, and one of another length."""

    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self.answer = answer

    def unwrap(self, blob: bytes, context: bytes) -> Secret:
        return Secret(self.answer)


def opens(data: bytes, owner: SigningKey, identity: Any) -> bool:
    found = sealed.load_file(MemorySource(data), identity=identity, signed_by=owner.verifying_key)
    return bool(np.array_equal(found["w"], MODEL["w"]))


def test_every_recipient_opens_it(seal: Seal, owner: SigningKey, identity: Identity, other: Identity) -> None:
    vault = Vault()
    assert isinstance(vault, KeyWrapper)
    data = seal(MODEL, recipients=[identity.recipient, other.recipient, vault])
    for who in (identity, other, vault):
        assert opens(data, owner, who)
    with pytest.raises(NoRecipient):
        opens(data, owner, Identity.generate())
    with pytest.raises(NoRecipient):
        opens(data, owner, Vault(name="vault/2"))


def test_a_passphrase_opens_it(seal: Seal, owner: SigningKey) -> None:
    data = seal(MODEL, recipients=[passphrase()])
    assert opens(data, owner, passphrase())
    # The work factor of the file counts, not the reader's own.
    assert opens(data, owner, passphrase(memory=16, passes=2))
    with pytest.raises(NoRecipient, match="passphrase"):
        opens(data, owner, passphrase("wrong horse"))


def test_the_default_work_factor_is_the_documented_one(seal: Seal) -> None:
    facts = sealed.public_facts(MemorySource(seal(MODEL, recipients=[sealed.Passphrase("p")])))
    (stanza,) = facts.slot.stanzas
    assert (stanza.fields["memory"], stanza.fields["passes"]) == (256 * 1024, 3)


@pytest.mark.parametrize("work", [{"memory": 7}, {"passes": 0}, {"passes": 65}, {"memory": 1 << 21},
                                  {"memory": 1 << 20, "passes": 5}])  # fmt: skip
def test_a_work_factor_that_no_reader_takes_is_refused(work: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="work factor"):
        passphrase(**work)


@pytest.mark.threat("SEAL-12")
def test_a_reader_does_not_spend_what_a_stranger_asks_for(
    assemble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that asks for 2 GiB, or hours, is malformed: no memory is taken, no hash is begun."""
    monkeypatch.setattr(sealed.Passphrase, "stretch", lambda *_: pytest.fail("it began"))
    for work in ({"memory": 1 << 21}, {"passes": 1000}, {"memory": 1 << 20, "passes": 64}):

        def greedy(body: dict[str, Any], work: dict[str, int] = work) -> dict[str, Any]:
            return body | {"stanzas": [body["stanzas"][0] | work]}

        monkeypatch.undo()
        data = assemble(recipients=[passphrase()], change={"slot": greedy}).build()
        monkeypatch.setattr(sealed.Passphrase, "stretch", lambda *_: pytest.fail("it began"))
        with pytest.raises(MalformedError, match="work factor"):
            sealed.load_file(MemorySource(data), identity=passphrase(), INSECURE_any_origin=True)


@pytest.mark.threat("SEAL-13")
@pytest.mark.parametrize(
    ("recipients", "message"),
    [
        (lambda i, o: [i.recipient, Vault("classical")], "do not mix"),
        (lambda i, o: [Vault("classical"), Vault(), i.recipient], "do not mix"),
        (lambda i, o: [i.recipient, passphrase()], "stands alone"),
        (lambda i, o: [passphrase(), passphrase()], "stands alone"),
        (lambda i, o: [i.recipient, o.recipient, i.recipient], "twice"),
        (lambda i, o: [Vault("best")], "label"),
        (lambda i, o: [Vault(name="")], "key name"),
        (lambda i, o: ["isolate-recipient-x"], "Recipient"),
        (lambda i, o: [Identity.generate().recipient for _ in range(30)], "header is full"),
    ],
)  # fmt: skip
def test_recipients_that_do_not_go_together(
    identity: Identity, other: Identity, owner: SigningKey, recipients: Any, message: str
) -> None:
    """Among them: a post-quantum file is no longer one if a classical key opens it too."""
    with pytest.raises(UsageError, match=message):
        sealed.SealedWriter(MemorySink(), recipients=recipients(identity, other), sign=owner)


def test_symmetric_goes_with_both(seal: Seal, owner: SigningKey, identity: Identity) -> None:
    assert opens(seal(MODEL, recipients=[identity.recipient, Vault()]), owner, Vault())
    assert opens(seal(MODEL, recipients=[Vault("classical"), Vault(name="v2")]), owner, Vault("classical"))


def test_twenty_three_recipients_fit(owner: SigningKey, identity: Identity, seal: Seal) -> None:
    many = [identity.recipient, *(Identity.generate().recipient for _ in range(22))]
    assert opens(seal(MODEL, recipients=many), owner, identity)


def test_a_wrapper_that_fails_or_lies(seal: Seal, owner: SigningKey) -> None:
    data = seal(MODEL, recipients=[Vault()])
    with pytest.raises(ServiceUnavailable):
        opens(data, owner, BrokenVault())
    for answer in (bytes(32), bytes(31), b""):
        with pytest.raises(Tampered, match="unlock"):
            opens(data, owner, LyingVault(answer))


def test_what_is_no_identity_is_a_usage_error(seal: Seal, owner: SigningKey, identity: Identity) -> None:
    data = seal(MODEL)
    for wrong in (None, "id.key", identity.recipient, b"key"):
        with pytest.raises(UsageError, match="identity="):
            opens(data, owner, wrong)


def test_an_unlocker_with_a_wrong_key_is_refused(seal: Seal, owner: SigningKey, identity: Identity) -> None:
    class Wrong:
        def unlock(self, facts: sealed.PublicFacts) -> sealed.FileKey:
            return sealed.FileKey.generate()

    assert isinstance(Wrong(), Unlocker)
    with pytest.raises(Tampered, match="unlock"):
        opens(seal(MODEL), owner, Wrong())


def test_an_unlocker_that_answers_nothing_is_a_usage_error(seal: Seal, owner: SigningKey) -> None:
    nothing = type("Nothing", (), {"unlock": lambda self, facts: None})()
    with pytest.raises(UsageError, match="answers"):
        opens(seal(MODEL), owner, nothing)


def test_hints_link_no_two_files(seal: Seal, identity: Identity) -> None:
    """Who does not hold the public key sees no common recipient; who does finds its stanza."""
    facts = [sealed.public_facts(MemorySource(seal(MODEL))) for _ in range(2)]
    hints = [fact.slot.stanzas[0].fields["hint"] for fact in facts]
    assert hints[0] != hints[1]
    assert hints == [hint(identity.recipient, fact.slot.params.salt) for fact in facts]


@pytest.mark.threat("SEAL-14")
def test_rewrap_changes_who_opens_it_and_nothing_else(
    tmp_path: Path, owner: SigningKey, identity: Identity, other: Identity
) -> None:
    path = tmp_path / "m"
    digest = sealed.save_file(MODEL, path, recipients=[identity.recipient], sign=owner)
    before = path.read_bytes()
    sealed.rewrap(path, identity=identity, recipients=[other.recipient, Vault()])
    after = path.read_bytes()
    assert after[layout.HEADER_SIZE :] == before[layout.HEADER_SIZE :]
    facts = sealed.public_facts(path)
    assert (facts.digest, facts.generation, len(facts.slot.stanzas)) == (digest, 2, 2)
    assert opens(after, owner, other)
    assert opens(after, owner, Vault())
    with pytest.raises(NoRecipient):
        opens(after, owner, identity)
    # Nothing of the removed stanza is left in either slot.
    removed = sealed.public_facts(MemorySource(before)).slot.stanzas[0].fields["box"]
    assert removed in before
    assert removed not in after
    sealed.rewrap(path, identity=other, recipients=[passphrase()])
    assert opens(path.read_bytes(), owner, passphrase())
    assert sealed.public_facts(path).generation == 3


@pytest.mark.threat("SEAL-14")
def test_a_rewrap_that_is_refused_changes_nothing(
    tmp_path: Path, owner: SigningKey, identity: Identity, other: Identity
) -> None:
    path = tmp_path / "m"
    sealed.save_file(MODEL, path, recipients=[identity.recipient], sign=owner)
    before = path.read_bytes()
    facts = sealed.public_facts(path)
    mere = sealed.compartment_keys(sealed.open_file_key(facts, identity), facts)
    released = type("Release", (), {"unlock": lambda self, facts: mere})()
    for who, to, error in [
        (other, [other.recipient], NoRecipient),
        (identity, [], UsageError),
        (identity, [identity.recipient, passphrase()], UsageError),
        (released, [other.recipient], UsageError),
    ]:
        with pytest.raises(error):
            sealed.rewrap(path, identity=who, recipients=to)
        assert path.read_bytes() == before
    with pytest.raises(StorageError):
        sealed.rewrap(tmp_path / "none", identity=identity, recipients=[other.recipient])
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(StorageError):
        sealed.rewrap(link, identity=identity, recipients=[other.recipient])
    path.write_bytes(before[:-1])
    with pytest.raises(RefusedError):
        sealed.rewrap(path, identity=identity, recipients=[other.recipient])


def test_a_release_names_compartments_that_exist(seal: Seal, identity: Identity) -> None:
    facts = sealed.public_facts(MemorySource(seal(MODEL)))
    key = sealed.open_file_key(facts, identity)
    with pytest.raises(UsageError, match="no compartment"):
        sealed.compartment_keys(key, facts, ["secret"])
    assert set(sealed.compartment_keys(key, facts, ["main"]).keys) == {"main"}
    with pytest.raises(UsageError):
        sealed.CompartmentKeys(b"short", {})
    with pytest.raises(UsageError):
        sealed.CompartmentKeys(bytes(32), {"main": Secret(b"short")})


def test_two_rewraps_at_once_do_not_mix(
    tmp_path: Path, owner: SigningKey, identity: Identity, other: Identity
) -> None:
    path = tmp_path / "m"
    sealed.save_file(MODEL, path, recipients=[identity.recipient], sign=owner)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="somebody else"):
            sealed.rewrap(path, identity=identity, recipients=[other.recipient])
    assert opens(path.read_bytes(), owner, identity)
