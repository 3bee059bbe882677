"""The log as outsiders see it: files over HTTP, their audit, and a service held to a checkpoint kept elsewhere."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from attrs import evolve
from click.testing import CliRunner

from isolate.cli import log as command
from isolate.client.audit import Auditor, Report
from isolate.crypto import cbor, merkle
from isolate.crypto.signing import SigningKey
from isolate.errors import LogRefused, ServiceUnavailable, StorageError, UsageError
from isolate.messages.receipts import UseReceipt
from isolate.service import head as heads
from isolate.service.app import Application
from isolate.service.head import Head
from isolate.transparency import Checkpoint, Tile, Witness, cosign, sign_checkpoint, tile_bytes, verifier_key
from isolate.transparency.checkpoint import COSIGNATURE
from isolate.transparency.keeping import read_checkpoint, write_checkpoint


def grow(realm: Any, count: int, kind: str = "test") -> None:
    """Entries in bulk, in one transaction."""
    with realm.state.transaction() as database:
        for number in range(count):
            realm.service.log.append(database, kind, {"number": number})


def fetcher(realm: Any, lies: dict[str, bytes] | None = None) -> Callable[[str, int], bytes]:
    def fetch(path: str, most: int) -> bytes:
        if lies is not None and path in lies:
            return lies[path]
        file = realm.service.tiles.answer(path)
        if file.status != 200 or len(file.body) > most:
            raise ServiceUnavailable(path)
        body: bytes = file.body
        return body

    return fetch


def auditor(realm: Any, *, lies: dict[str, bytes] | None = None, **options: Any) -> Auditor:
    public = realm.state.log_key.verifying_key.ed25519
    return Auditor(fetcher(realm, lies), origin=realm.service.log.origin, public=public, **options)


def verify(realm: Any, remembered: str | None = None, **options: Any) -> Report:
    return auditor(realm, remembered=remembered, **options).run()


@pytest.mark.parametrize(
    "sizes",
    [(1, 1), (200, 57), (255, 1), (256, 256), (300, 700), pytest.param((1, 66_000), marks=pytest.mark.slow)],
)
def test_an_honest_log_is_verified_from_nothing_and_from_what_was_remembered(
    realm: Any, sizes: tuple[int, int]
) -> None:
    grow(realm, sizes[0] - 1)  # the policy is in it already
    first = verify(realm)
    assert (first.old, first.checkpoint.size) == (None, sizes[0])
    assert first.kinds == {"policy": 1, **({"test": sizes[0] - 1} if sizes[0] > 1 else {})}
    again = verify(realm, first.checkpoint.text)
    assert (again.old, again.kinds) == (sizes[0], {})
    grow(realm, sizes[1], "later")
    then = verify(realm, first.checkpoint.text)
    assert (then.old, then.checkpoint.size) == (sizes[0], sum(sizes))
    assert then.kinds == {"later": sizes[1]}


def get(realm: Any, path: str, method: str = "GET") -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Application(realm.service))
        async with httpx.AsyncClient(transport=transport, base_url="http://log") as client:
            return await client.request(method, f"/log/{path}")

    return asyncio.run(ask())


def test_files_over_http(realm: Any) -> None:
    grow(realm, 599)
    note = get(realm, "checkpoint")
    assert (note.status_code, note.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert note.headers["cache-control"] == "no-cache"
    assert note.text.splitlines()[:2] == ["isolate/svc/1", "600"]
    full, part = get(realm, "tile/0/000"), get(realm, "tile/0/002.p/88")
    assert (len(full.content), len(part.content)) == (256 * 32, 88 * 32)
    assert "immutable" in full.headers["cache-control"]
    assert get(realm, "tile/0/000", "HEAD").status_code == 200
    # An auditor with an older checkpoint asks for what was there then.
    assert get(realm, "tile/0/002.p/7").content == part.content[: 7 * 32]
    assert len(get(realm, "tile/1/000.p/2").content) == 64
    assert get(realm, "tile/entries/002.p/88").content[2:3] == b"\xa3"
    for wrong in (
        "", "tile/0/002", "tile/0/002.p/89", "tile/0/003.p/1", "tile/0/000.p/256", "tile/8/000", "tile/0/0",
        "tile/entries/002", "tile/entries/003.p/1", "tile/entries/x999/999", "checkpoint/", "tile/0/-01",
        "tile/0/..%2F000", "tile/0/x999/x999/x999/x999/x999/x999/999", "%00",
        # Beyond the largest tree, and beyond the numbers of the database.
        "tile/0/x018/x014/x398/x509/x481/984", "tile/entries/x018/x014/x398/x509/x481/985",
        "tile/entries/x004/x611/x686/x018/x427/x387/903", "tile/7/x004/x611/x686/x018/x427/x387/904",
    ):  # fmt: skip
        assert get(realm, wrong).status_code == 404, wrong
    assert get(realm, "checkpoint", "POST").status_code == 405
    realm.fail("SELECT")
    assert get(realm, "tile/0/000").status_code == 503


@pytest.mark.threat("LOG-20")
def test_a_log_that_is_cut_back_is_refused(realm: Any) -> None:
    grow(realm, 299)
    copy = Path(shutil.copytree(realm.folder / "state", realm.folder / "copy"))
    grow(realm, 40)
    remembered = verify(realm).checkpoint.text
    restore(realm, copy)
    for extra in (0, 39):
        grow(realm, extra)
        with pytest.raises(LogRefused) as refused:
            verify(realm, remembered)
        assert refused.value.code == "log_shrunk"


@pytest.mark.threat("LOG-20")
@pytest.mark.parametrize(
    ("extra", "code"), [(40, "log_forked"), (41, "log_inconsistent"), (400, "log_inconsistent")]
)
def test_a_log_that_is_forked_is_refused(realm: Any, extra: int, code: str) -> None:
    grow(realm, 299)
    copy = Path(shutil.copytree(realm.folder / "state", realm.folder / "copy"))
    grow(realm, 40)
    remembered = verify(realm).checkpoint.text
    restore(realm, copy)
    grow(realm, extra)
    asked = auditor(realm, remembered=remembered)
    with pytest.raises(LogRefused) as refused:
        asked.run()
    assert refused.value.code == code
    # Both notes bear the log's signature: whoever has the two can show them to anybody.
    assert asked.shown is not None
    assert asked.shown.text != remembered


def restore(realm: Any, copy: Path) -> None:
    realm.state.close()
    shutil.rmtree(realm.folder / "state")
    shutil.copytree(copy, realm.folder / "state")
    realm.open()


@pytest.mark.threat("LOG-21")
@pytest.mark.parametrize("remember", [None, 100, 256, 300])
def test_an_entry_that_is_not_the_logged_one_is_refused(realm: Any, remember: int | None) -> None:
    grow(realm, (remember or 300) - 1)
    remembered = verify(realm).checkpoint.text if remember else None
    grow(realm, 600 - (remember or 300))
    honest = fetcher(realm)
    bundles = [Tile(None, index, min(256, 600 - 256 * index)).path for index in range(3)]
    for path in bundles[(remember or 0) // 256 :]:
        body = honest(path, 1 << 20)
        changed = bytearray(body)
        changed[-1] ^= 1
        cut = body[: -(2 + int.from_bytes(body[:2], "big"))]
        for lie in (bytes(changed), cut, body + body[:92], b""):
            with pytest.raises(LogRefused):
                verify(realm, remembered, lies={path: lie})


@pytest.mark.threat("LOG-21")
def test_false_tiles_are_refused(realm: Any) -> None:
    grow(realm, 299)
    remembered = verify(realm).checkpoint.text
    grow(realm, 700)
    asked: list[str] = []
    honest = fetcher(realm)

    def fetch(path: str, most: int) -> bytes:
        asked.append(path)
        return honest(path, most)

    public = realm.state.log_key.verifying_key.ed25519
    Auditor(fetch, origin=realm.service.log.origin, public=public, remembered=remembered).run()
    tiles = {path for path in asked if path.startswith("tile/") and "entries" not in path}
    assert tiles
    for path in tiles:
        body = honest(path, 1 << 20)
        for lie in (bytes(len(body)), body[:-1], body + b"\0"):
            with pytest.raises(LogRefused):
                verify(realm, remembered, lies={path: lie})


@pytest.mark.threat("LOG-21")
@pytest.mark.parametrize(
    "entry",
    [
        b"", b"\xa0", cbor.encode({"kind": "release", "time": 1, "commitment": b"short"}),
        cbor.encode({"kind": "a\nb", "time": 1, "commitment": bytes(32)}),
        cbor.encode({"kind": "", "time": 1, "commitment": bytes(32)}),
        cbor.encode({"kind": "x", "time": 1, "commitment": bytes(32), "more": 1}),
    ],
)  # fmt: skip
def test_an_entry_of_another_form_is_refused_although_it_is_logged(realm: Any, entry: bytes) -> None:
    with realm.state.transaction() as database:
        nodes, size = realm.service.log.tree(database)
        merkle.extend(nodes, size, (entry,))
        database.execute("INSERT INTO entry VALUES (?, ?, ?, ?)", (size, entry, b"", b""))
    with pytest.raises(LogRefused, match="entry 1"):
        verify(realm)


@pytest.mark.threat("LOG-22")
def test_witnesses_are_asked_for_and_counted(realm: Any) -> None:
    keys = [SigningKey.generate() for _ in range(2)]
    names = ["example.com/w1", "example.com/w2"]
    known = [Witness.parse(verifier_key(name, key.verifying_key.ed25519, COSIGNATURE))
             for name, key in zip(names, keys, strict=True)]  # fmt: skip
    public = realm.state.log_key.verifying_key.ed25519
    bare = Checkpoint.verify(realm.service.log.checkpoint(), realm.service.log.origin, public)
    one = cosign(bare, keys[0], names[0], at=7)
    for note, quorum, good in ((bare.text, 0, True), (bare.text, 1, False), (one, 1, True), (one, 2, False)):
        options = {"lies": {"checkpoint": note.encode()}, "witnesses": known, "quorum": quorum}
        if good:
            report = verify(realm, **options)
            assert report.checkpoint.witnessed == ({names[0]: 7} if note is one else {})
        else:
            with pytest.raises(LogRefused, match="asked for"):
                verify(realm, **options)
    for wrong in (
        "", "name", "name+00000000+AAAA", verifier_key(names[0], keys[0].verifying_key.ed25519),
        verifier_key(names[0], bytes(32), COSIGNATURE), verifier_key(names[0], public, COSIGNATURE)[:-2],
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Witness.parse(wrong)


# The command


@pytest.fixture
def run(realm: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`isolate log verify` against the realm, with ``lies`` between."""
    lies: dict[str, bytes] = {}

    def invoke(*words: str, **changes: bytes) -> Any:
        lies.clear()
        lies.update(changes)
        owner = str(realm.owner.verifying_key)
        words = ("verify", "--service", "unix:/x", "--owner", owner, "--lineage", "acme", *words)
        return CliRunner().invoke(command.log_group, words)

    def fetch(_: str, path: str, *, most: int) -> bytes:
        return fetcher(realm, lies)(path.removeprefix("/log/"), most)

    monkeypatch.setattr(command, "fetch", fetch)
    yield invoke


@pytest.mark.threat("LOG-20")
def test_the_command_remembers_and_keeps_what_convicts(realm: Any, run: Any, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    first = run("--remember", str(seen), "--json")
    assert first.exit_code == 0, first.output
    said = json.loads(first.output[first.output.index("{\n") :])
    assert (said["size"], said["remembered"], said["kinds"]) == (1, None, {"policy": 1})
    realm.rule("a/b")
    then = run("--remember", str(seen))
    assert "2 entries; the 1 remembered ones stand" in then.output
    assert "1 rule" in then.output
    kept = seen.read_text()
    forked = sign_checkpoint(realm.state.log_key, "isolate/svc/1", 2, bytes(32))
    refused = run("--remember", str(seen), checkpoint=forked.encode())
    assert isinstance(refused.exception, LogRefused)
    assert refused.exception.code == "log_forked"
    assert seen.read_text() == kept
    assert (tmp_path / "seen.refused").read_text() == forked
    # A memory that somebody else wrote is none.
    seen.write_text(sign_checkpoint(SigningKey.generate(), "isolate/svc/1", 1, bytes(32)))
    assert isinstance(run("--remember", str(seen)).exception, LogRefused)


def test_a_recovery_is_accepted_with_a_good_log_only(
    realm: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, before = tmp_path / "seen", tmp_path / "seen.before-2"
    accept = ("--remember", str(seen), "--accept-epoch", "2")
    assert run("--remember", str(seen)).exit_code == 0
    kept = seen.read_text()
    found = command.certificate
    monkeypatch.setattr(command, "certificate", lambda *given: evolve(found(*given), epoch=2))
    key = realm.state.log_key
    root = Checkpoint.verify(kept, "isolate/svc/1", key.verifying_key.ed25519).root
    new = sign_checkpoint(key, "isolate/svc/2", 1, root)
    # Not yet accepted; accepted, but the log is still that of before.
    assert run(*accept[:2], checkpoint=new.encode()).exception.code == "log_recovered"
    assert isinstance(run(*accept).exception, LogRefused)
    assert (seen.read_text(), before.exists()) == (kept, False)
    assert run(*accept, checkpoint=new.encode()).exit_code == 0
    assert (seen.read_text(), before.read_text()) == (new, kept)


@pytest.mark.threat("BUD-4")
def test_the_command_convicts_by_what_the_service_signed_only(
    realm: Any, run: Any, till: Any, holder: SigningKey, tmp_path: Path
) -> None:
    use = till.receipt(till.send(realm.use(realm.grant(holder), holder)).invocation, holder)
    index, key = use.settled.log_index, realm.state.release_key

    def look(receipt: UseReceipt, name: str) -> Any:
        receipt.save(tmp_path / name)
        return run("--remember", str(tmp_path / f"{name}.seen"), "--receipt", str(tmp_path / name))

    def placed(at: int, signer: SigningKey) -> UseReceipt:
        return evolve(use, receipt=evolve(use.settled, log_index=at).sign(signer).encode())

    assert f"good: entry {index}, a use of a/b: 256 bytes, a result\n" in look(use, "good").output
    for name, receipt, code in (
        ("cut", placed(index + 1, key), "log_shrunk"),
        ("other", placed(0, key), "log_inconsistent"),
        ("forged", placed(index + 1, SigningKey.generate()), "log_refused"),
        ("broken", evolve(use, details=b""), "malformed"),
    ):
        error = look(receipt, name).exception
        assert (error.code, str(tmp_path / name) in error.message) == (code, True)
        assert (tmp_path / f"{name}.seen.refused").exists() == (name in ("cut", "other"))
        assert not (tmp_path / f"{name}.seen").exists()
    failed = till.reserve(realm.use(realm.grant(holder), holder)).invocation
    till.settle(failed, 9, "operation_failed")
    assert "9 bytes, ended as operation_failed\n" in look(till.receipt(failed, holder), "failed").output


def test_the_command_says_what_it_cannot_see(run: Any) -> None:
    said = run().output
    assert "compare with others" in said
    assert "nothing was remembered" in said
    wanted = verifier_key("example.com/w", SigningKey.generate().verifying_key.ed25519, COSIGNATURE)
    assert isinstance(run("--witness", wanted).exception, LogRefused)
    assert run("--witness", wanted, "--quorum", "0").exit_code == 0


# The head of the log, kept elsewhere


def head(realm: Any, path: Path, **options: Any) -> Head:
    return Head(realm.state, realm.service.log, path, **options)


@pytest.mark.threat("LOG-23")
def test_a_restored_state_is_not_served(realm: Any, tmp_path: Path) -> None:
    path = tmp_path / "head"
    with head(realm, path, first=True):
        grow(realm, 10)
    assert (read_checkpoint(path) or "").splitlines()[1] == "11"
    realm.reopen()
    copy = Path(shutil.copytree(realm.folder / "state", realm.folder / "copy"))
    with head(realm, path):
        grow(realm, 5)
    restore(realm, copy)
    kept = path.read_text()
    for extra, code in ((0, "log_shrunk"), (4, "log_shrunk"), (1, "log_forked"), (7, "log_forked")):
        grow(realm, extra)
        with pytest.raises(LogRefused) as refused:
            head(realm, path)
        assert refused.value.code == code
    assert path.read_text() == kept


@pytest.mark.threat("LOG-23")
def test_a_checkpoint_that_is_missing_or_anothers_is_no_checkpoint(realm: Any, tmp_path: Path) -> None:
    path = tmp_path / "head"
    with pytest.raises(LogRefused) as refused:
        head(realm, path)
    assert refused.value.code == "checkpoint_missing"
    assert not path.exists()
    size, root = (
        1,
        Checkpoint.verify(
            realm.service.log.checkpoint(), "isolate/svc/1", realm.state.log_key.verifying_key.ed25519
        ).root,
    )
    for wrong in (
        b"", b"\xff\xfe", b"x" * 70_000,
        sign_checkpoint(SigningKey.generate(), "isolate/svc/1", size, root).encode(),
        sign_checkpoint(realm.state.log_key, "isolate/other", size, root).encode(),
    ):  # fmt: skip
        path.write_bytes(wrong)
        for first in (True, False):
            with pytest.raises(LogRefused):
                head(realm, path, first=first)
        assert path.read_bytes() == wrong


def test_the_checkpoint_is_kept_while_the_log_grows(
    realm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "EVERY", 0.01)
    path = tmp_path / "head"
    with head(realm, path, first=True):
        before = path.read_text()
        grow(realm, 3)
        for _ in range(1000):
            if path.read_text() != before:
                break
            time.sleep(0.01)
        assert path.read_text().splitlines()[1] == "4"


def test_a_checkpoint_that_cannot_be_written_is_said_so(realm: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        head(realm, tmp_path / "nowhere" / "head", first=True)
    with pytest.raises(StorageError):
        read_checkpoint(tmp_path)
    path = tmp_path / "seen"
    write_checkpoint(path, "old")
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError):
            write_checkpoint(path, "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir() if one.is_file()] == [("seen", "old")]


def test_what_the_tree_shows_is_what_the_tiles_hold(realm: Any) -> None:
    grow(realm, 700)
    with realm.state.transaction() as database:
        nodes, _ = realm.service.log.tree(database)
        assert realm.service.tiles.answer("tile/0/001").body == tile_bytes(nodes, Tile(0, 1))
