"""Receipts: a holder gets one for each settled use, and whoever has it finds the use in the log, or sees a lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from isolate.capability.scope import Scope
from isolate.client.audit import Auditor
from isolate.crypto import cbor, merkle
from isolate.crypto.signing import SigningKey, write_key_file
from isolate.errors import IsolateError, KeyFormatError, LogRefused, MalformedError, StorageError
from isolate.messages.invoke import Receipt
from isolate.messages.owner import LogAnswer, LogRequest, Revoke
from isolate.messages.receipts import UseReceipt, commitment
from isolate.service.tiles import Tiles
from isolate.transparency.checkpoint import Checkpoint, sign_checkpoint
from isolate.transparency.proof import InclusionProof


@pytest.fixture
def use(realm: Any, till: Any, holder: SigningKey) -> UseReceipt:
    """Of a use that was made, with another one after it."""
    number = till.send(realm.use(realm.grant(holder), holder)).invocation
    till.send(realm.use(realm.grant(holder), holder))
    receipt: UseReceipt = till.receipt(number, holder)
    return receipt


def proved(realm: Any, index: int) -> tuple[bytes, InclusionProof, Checkpoint]:
    """An entry of the service's log, its place, and a checkpoint."""
    certificate = realm.state.certificate
    answer = realm.post("", "log", LogRequest(0, index), LogAnswer)
    checkpoint = Checkpoint.verify(answer.checkpoint, certificate.origin, certificate.log_key.ed25519)
    return answer.entry, InclusionProof(index, checkpoint.size, tuple(answer.inclusion)), checkpoint


def resigned(use: UseReceipt, key: SigningKey, **changes: Any) -> UseReceipt:
    """Another receipt with the same opening, signed all the same."""
    return evolve(use, receipt=evolve(use.settled, **changes).sign(key).encode())


@pytest.mark.threat("BUD-4")
def test_a_receipt_is_found_in_the_log(realm: Any, use: UseReceipt) -> None:
    said, release = use.settled, realm.state.release_key
    entry, proof, checkpoint = proved(realm, said.log_index)
    use.verify(release.verifying_key, entry, proof, checkpoint)
    assert realm.entries()[said.log_index] == {"kind": "settled", **cbor.decode(use.details)}
    other, before = proved(realm, len(realm.entries()) - 1)[:2], proved(realm, said.log_index - 1)[:2]
    wrong: list[tuple[UseReceipt, bytes, InclusionProof]] = [
        (resigned(use, release, log_index=said.log_index + 2), entry, proof),
        (resigned(use, release, leaf=bytes(32)), entry, proof),
        (use, other[0], proof),
        (use, entry, other[1]),
        (use, entry, evolve(proof, hashes=proof.hashes[:-1])),
        # Somebody else's signature, and the service's over another use, size or code than the details name.
        (resigned(use, SigningKey.generate()), entry, proof),
        (resigned(use, release, invocation=bytes(32)), entry, proof),
        (resigned(use, release, bytes_out=255), entry, proof),
        (resigned(use, release, code="operation_failed"), entry, proof),
        # Of an entry that is about something else: the other use, by its own opening and by a false one.
        (resigned(use, release, log_index=other[1].index, leaf=merkle.leaf_hash(other[0])), *other),
        (evolve(use, salt=bytes(32)), entry, proof),
        (evolve(use, details=cbor.encode({**cbor.decode(use.details), "asset": "c"})), entry, proof),
        # Of a use that was reserved only; and one that was written down after it was said to be.
        (resigned(use, release, log_index=before[1].index, leaf=merkle.leaf_hash(before[0])), *before),
        (resigned(use, release, time=said.time - 1), entry, proof),
    ]
    for one, public, path in wrong:
        with pytest.raises(LogRefused):
            one.verify(release.verifying_key, public, path, checkpoint)


@pytest.mark.threat("BUD-4")
def test_a_receipt_of_what_is_no_entry(use: UseReceipt) -> None:
    key, details = SigningKey.generate(), use.details
    good = {"kind": "settled", "time": use.settled.time, "commitment": commitment(use.salt, details)}
    bad = [good | {"kind": "use"}, good | {"time": ""}, good | {"commitment": b""}, {"kind": "settled"}, [good], {}]
    for entry in (b"", b"\x00", *map(cbor.encode, (*bad, good))):
        store = merkle.MemoryStore()
        note = sign_checkpoint(key, "log", 1, merkle.append(store, 0, entry))
        checkpoint, proof = Checkpoint.verify(note, "log", key.verifying_key.ed25519), InclusionProof(0, 1, ())
        said = resigned(use, key, log_index=0, leaf=merkle.leaf_hash(entry))
        try:
            said.verify(key.verifying_key, entry, proof, checkpoint)
            code = ""
        except LogRefused as error:
            code = error.code
        assert code == ("" if entry == cbor.encode(good) else "log_inconsistent")


def test_what_is_no_receipt(use: UseReceipt) -> None:
    key = SigningKey.generate().verifying_key
    for one in (evolve(use, receipt=b""), evolve(use, receipt=use.encode()), evolve(use, details=b"\xff")):
        with pytest.raises(MalformedError if one.details == use.details else LogRefused):
            one.check(key)
    signer = SigningKey.generate()
    for details in (b"\xff", cbor.encode([]), cbor.encode({}), cbor.encode({"invocation": "x"})):
        with pytest.raises((LogRefused, MalformedError)):
            evolve(resigned(use, signer), details=details).check(signer.verifying_key)
    with pytest.raises(MalformedError):
        evolve(use, salt=b"")


@pytest.mark.threat("BUD-14")
def test_a_receipt_is_told_to_the_holders_of_its_chain_only(realm: Any, till: Any, holder: SigningKey) -> None:
    analyst, neighbour = SigningKey.generate(), SigningKey.generate()
    token = realm.grant(holder)
    child = token.attenuate(holder, Scope(uses=5), analyst.verifying_key.ed25519)
    # Of the same asset, through a handle of her own: and through the analyst's, whom she passed nothing on to.
    till.send(realm.use(realm.grant(neighbour), neighbour))
    number = till.send(realm.use(child, analyst)).invocation
    rows = realm.rows()
    assert till.receipt(number, analyst).settled.invocation == number
    assert till.receipt(number, holder).settled.invocation == number
    unknown = realm.code(lambda: till.receipt(bytes(32), analyst))
    for stranger in (neighbour, SigningKey.generate(), realm.owner):
        assert realm.code(lambda: till.receipt(number, stranger)) == unknown == "unknown_reservation"  # noqa: B023
    assert realm.rows() == rows


def test_what_is_open_has_no_receipt_and_what_has_ended_keeps_its(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token = realm.grant(holder, expires=realm.clock.now + 100)
    done, left_open = (till.reserve(realm.use(token, holder)).invocation for _ in range(2))
    assert realm.code(lambda: till.receipt(done, holder)) == "not_settled"
    first = till.settle(done, 200, "operation_failed")
    for end in (lambda: realm.tell("revoke", Revoke(token.id)), lambda: realm.clock.__init__(), realm.reopen):
        end()
        said = till.receipt(done, holder).settled
        assert (said.bytes_out, said.code, said.log_index, said.leaf) == (200, *(
            first.code, first.log_index, first.leaf,
        ))  # fmt: skip
    realm.clock.now += 1000
    assert till.receipt(done, holder).settled.time == realm.clock.now
    assert realm.code(lambda: till.receipt(left_open, holder)) == "not_settled"


@pytest.mark.threat("BUD-4")
def test_an_auditor_finds_the_use_of_a_receipt(realm: Any, till: Any, holder: SigningKey) -> None:
    token, uses = realm.grant(holder), []
    for _ in range(2):
        uses.append(till.receipt(till.send(realm.use(token, holder)).invocation, holder))
        with realm.state.transaction() as database:
            for number in range(300):  # more than a bundle of the log
                realm.service.log.append(database, "other", {"number": number})
    certificate, other = realm.state.certificate, dict[str, bytes]()
    tiles = Tiles(realm.state, realm.service.log)
    auditor = Auditor(
        lambda path, _: other.get(path) or tiles.answer(path).body,
        origin=certificate.origin, public=certificate.log_key.ed25519,
    )  # fmt: skip
    at = auditor.run().checkpoint

    def find(use: UseReceipt, at: Checkpoint = at) -> str:
        code: str = realm.code(lambda: auditor.find(use, certificate.release_key, at))
        return code

    def cut(size: int) -> Checkpoint:
        note = sign_checkpoint(realm.state.log_key, certificate.origin, size, bytes(32))
        return Checkpoint.verify(note, certificate.origin, certificate.log_key.ed25519)

    first, last = (use.settled.log_index for use in uses)
    assert first < 256 < last
    assert [find(use) for use in uses] == ["", ""]
    # The service says that a use is settled, and shows a log that ends before it.
    assert (find(uses[1], cut(last)), find(uses[0], cut(first))) == ("log_shrunk", "log_shrunk")
    for index in (-1, at.size):
        assert find(resigned(uses[0], realm.state.release_key, log_index=index)) == "log_shrunk"
    # Or another entry in its place.
    bundle = tiles.answer("tile/entries/000").body
    other["tile/entries/000"] = bundle.replace(b"settled", b"sittled")
    assert [find(use) for use in uses] == ["log_inconsistent", ""]


def test_a_receipt_is_a_file_of_one_line(use: UseReceipt, tmp_path: Path) -> None:
    path = tmp_path / "use.receipt"
    use.save(path)
    assert UseReceipt.load(path) == use == UseReceipt.from_text(use.to_text())
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError):
        use.save(path)
    text = use.to_text()
    for number, wrong in enumerate((text[:-1], text.replace("receipt", "approval"), "isolate-receipt-", text * 9)):
        write_key_file(tmp_path / str(number), "", wrong)
        with pytest.raises((KeyFormatError, MalformedError)):
            UseReceipt.load(tmp_path / str(number))
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(StorageError):
            UseReceipt.load(missing)
    # What opens an entry stands in no log by mistake.
    assert (
        use.salt.hex() not in repr(use) and repr(use.salt) not in repr(use) and repr(use.details) not in repr(use)
    )


def test_a_receipt_is_of_a_settled_use(realm: Any, use: UseReceipt) -> None:
    said = use.check(realm.state.certificate.release_key)
    assert isinstance(said, Receipt) and (said.bytes_out, said.code) == (256, "")
    with pytest.raises(IsolateError, match="keys were renewed"):
        use.check(SigningKey.generate().verifying_key)
