"""Receipts: a holder gets one for each settled use, and whoever has it finds the use in the log, or sees a lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from isolate.capability.scope import Scope
from isolate.client.audit import Auditor
from isolate.crypto import cbor, merkle
from isolate.crypto.signing import Purpose, SigningKey, write_key_file
from isolate.errors import KeyFormatError, LogRefused, MalformedError, StorageError
from isolate.messages.base import Signed
from isolate.messages.invoke import MAX_BYTES_OUT
from isolate.messages.owner import MAX_ASSET, LogAnswer, LogRequest, Revoke
from isolate.messages.receipts import ReceiptRequest, UseReceipt, commitment
from isolate.service.recovery import recover, rotate
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
    assert entry == use.entry and realm.entries()[said.log_index] == {"kind": "settled", **use.about}
    other, before = proved(realm, len(realm.entries()) - 1)[:2], proved(realm, said.log_index - 1)[:2]
    # Of another asset, opened rightly: but that is no entry which the service signed for.
    details = cbor.encode({**use.about, "asset": "c"})
    opened = cbor.encode({**cbor.decode(entry), "commitment": commitment(use.salt, details)})
    wrong: list[tuple[UseReceipt, bytes, InclusionProof]] = [
        # Somebody else's signature, and the service's over another use, size or code than the entry is about.
        (resigned(use, SigningKey.generate()), entry, proof),
        (resigned(use, release, invocation=bytes(32)), entry, proof),
        (resigned(use, release, bytes_out=255), entry, proof),
        (resigned(use, release, code="operation_failed"), entry, proof),
        # What was changed after it was signed.
        (evolve(use, salt=bytes(32)), entry, proof),
        (evolve(use, details=details), entry, proof),
        (evolve(use, entry=other[0]), *other),
        (evolve(use, entry=opened, details=details), entry, proof),
        # A place that it does not name, or that is not there, as who carries the log may well show it.
        (use, entry, other[1]),
        (use, *other),
        (use, other[0], proof),
        (resigned(use, release, log_index=said.log_index + 2), entry, proof),
        (use, entry, evolve(proof, hashes=proof.hashes[:-1])),
        (use, entry, evolve(proof, size=proof.size - 1)),
        # It was written down after it was said to be.
        (resigned(use, release, time=said.time - 1), entry, proof),
    ]
    for one, public, path in wrong:
        with pytest.raises(LogRefused) as error:
            one.verify(release.verifying_key, public, path, checkpoint)
        # None of these is a proof against the service.
        assert error.value.code == "log_refused"
    # This is: the log has something else where the service said that the use is.
    for public, path in (other, before):
        lie = resigned(use, release, log_index=path.index)
        with pytest.raises(LogRefused) as error:
            lie.verify(release.verifying_key, public, path, checkpoint)
        assert error.value.code == "log_inconsistent"


@pytest.mark.threat("BUD-4")
def test_a_receipt_of_what_is_no_entry(use: UseReceipt) -> None:
    key, details = SigningKey.generate(), use.details
    good = {"kind": "settled", "time": use.settled.time, "commitment": commitment(use.salt, details)}
    bad = [good | {"kind": "use"}, good | {"time": ""}, good | {"commitment": b""}, {"kind": "settled"}, [good], {}]
    for entry in (b"", b"\x00", *map(cbor.encode, (*bad, good))):
        store = merkle.MemoryStore()
        note = sign_checkpoint(key, "log", 1, merkle.append(store, 0, entry))
        checkpoint, proof = Checkpoint.verify(note, "log", key.verifying_key.ed25519), InclusionProof(0, 1, ())
        said = evolve(resigned(use, key, log_index=0, leaf=merkle.leaf_hash(entry)), entry=entry)
        try:
            said.verify(key.verifying_key, entry, proof, checkpoint)
            assert entry == cbor.encode(good)
        except (LogRefused, MalformedError):
            assert entry != cbor.encode(good)


def test_what_is_no_receipt(use: UseReceipt) -> None:
    signer = SigningKey.generate()
    good = resigned(use, signer)
    assert good.check(signer.verifying_key) == good.settled
    broken = [b"\xff", *map(cbor.encode, ([], {}, use.about | {"more": 1}, use.about | {"bytes_out": True}))]
    for one in (
        evolve(good, receipt=b""), evolve(good, receipt=good.encode()), evolve(good, receipt=bytes(512)),
        *(evolve(good, details=details) for details in broken),
    ):  # fmt: skip
        with pytest.raises(MalformedError):
            one.check(signer.verifying_key)
    sizes = {"receipt": bytes(513), "entry": bytes(257), "salt": b"", "details": bytes(2049)}
    for name, value in sizes.items():
        with pytest.raises(MalformedError):
            evolve(use, **{name: value})


def test_the_longest_receipt_there_can_be_is_given_and_kept(
    realm: Any, till: Any, holder: SigningKey, tmp_path: Path
) -> None:
    name, code = "\U00020000" * MAX_ASSET, "c" * 64
    realm.rule(name, readers=("reader",))
    use = realm.use(realm.grant(holder, name), holder, bytes_out=MAX_BYTES_OUT)
    number = till.reserve(use).invocation
    till.settle(number, MAX_BYTES_OUT, code)
    receipt = till.receipt(number, holder)
    assert (receipt.about["asset"], receipt.about["code"]) == (name, code)
    receipt.save(tmp_path / "use.receipt")
    assert UseReceipt.load(tmp_path / "use.receipt") == receipt


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
    # A holder's key stands in every token: it takes a signature, for this and for this service.
    body, here = ReceiptRequest(number).encode(), realm.state.audience
    mine, other = (
        Signed.make(purpose, analyst, body, bytes(32), here)
        for purpose in (Purpose.HOLDER_REQUEST, Purpose.ENCLAVE_REQUEST)
    )
    stolen = Signed.make(Purpose.HOLDER_REQUEST, neighbour, body, bytes(32), here)
    for forged, code in (
        (evolve(stolen, key=analyst.verifying_key.to_bytes()), "bad_signature"),
        (other, "bad_signature"),
        (evolve(mine, body=ReceiptRequest(bytes(32)).encode()), "bad_signature"),
        (Signed.make(Purpose.HOLDER_REQUEST, analyst, body, bytes(32), "another/1"), "wrong_audience"),
    ):
        assert realm.code(lambda forged=forged: realm.ask("receipt", forged, UseReceipt)) == code
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


@pytest.mark.parametrize("act", [rotate, recover])
def test_a_receipt_after_the_services_keys_were_renewed(
    realm: Any, till: Any, holder: SigningKey, act: Callable[..., Any]
) -> None:
    token = realm.grant(holder)
    done, left_open = (till.reserve(realm.use(token, holder)).invocation for _ in range(2))
    till.settle(done)
    before = till.receipt(done, holder)
    realm.state.close()
    act(realm.folder / "state", owner=realm.owner, unlock=realm.unlock, clock=realm.clock)
    realm.open()
    release = realm.state.release_key.verifying_key
    with pytest.raises(LogRefused, match="keys were renewed"):
        before.check(release)
    # Asked for again it is the same use, in the log of now.
    after = till.receipt(done, holder)
    assert (after.entry, after.salt, after.details) == (before.entry, before.salt, before.details)
    after.verify(release, *proved(realm, after.settled.log_index))
    assert realm.code(lambda: till.receipt(left_open, holder)) == "not_settled"


@pytest.mark.threat("BUD-14")
@pytest.mark.parametrize("index", [1, "the other's"])
def test_no_other_entry_is_opened_where_the_state_names_one(
    realm: Any, till: Any, holder: SigningKey, index: Any
) -> None:
    """As one of an earlier version does, which has 1 for every use that was settled."""
    number = till.send(realm.use(realm.grant(holder), holder)).invocation
    other = SigningKey.generate()
    index = index if index == 1 else till.send(realm.use(realm.grant(other), other)).log_index
    with realm.state.transaction() as database:
        database.execute("UPDATE reservation SET settled = ? WHERE invocation = ?", (index, number))
    assert realm.code(lambda: till.receipt(number, holder)) == "not_settled"


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
    # The service says that a use is settled, and shows a log that ends before it, or has another entry there.
    assert (find(uses[1], cut(last)), find(uses[0], cut(first))) == ("log_shrunk", "log_shrunk")
    for index, code in ((-1, "log_shrunk"), (at.size, "log_shrunk"), (last, "log_inconsistent")):
        assert find(resigned(uses[0], realm.state.release_key, log_index=index)) == code
        # What it did not sign, and what a courier changed on its way, is no proof against it.
        assert find(resigned(uses[0], SigningKey.generate(), log_index=index)) == "log_refused"
    other["tile/entries/000"] = tiles.answer("tile/entries/000").body.replace(b"settled", b"sittled")
    assert [find(use) for use in uses] == ["log_refused", ""]
    other["tile/entries/000"] = b""
    assert find(uses[0]) == ""
    other["tile/0/000"] = tiles.answer("tile/0/001.p/" + str(at.size - 256)).body.ljust(8192, b"x")
    assert find(uses[0]) == "log_refused"


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
