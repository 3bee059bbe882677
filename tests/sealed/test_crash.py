"""Kill at the n-th operation on the file system, for every n: afterwards the old file or the new one.

The operations of stores.py and rewrap.py go through the module ``os``; here a double takes its place, counts what
changes something, and at the n-th either does half of it (a torn write) or nothing, and is dead from there on:
what the process would still do to tidy up does not happen.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import Identity, SigningKey, sealed
from isolate.errors import NoRecipient, SealedError, StorageError
from isolate.sealed import stores

# The package has a function of the same name.
rewrapping = importlib.import_module("isolate.sealed.rewrap")
COUNTED = ("write", "pwrite", "fsync", "fdatasync", "link", "replace", "open", "unlink")


class Killed(BaseException):
    """The process is gone. No error of the library, so nothing may catch it for good."""


class DyingOS:
    """``os``, which dies at the n-th counted operation; ``torn``: that one is half done if it is a write."""

    def __init__(self, n: int, torn: bool) -> None:
        self.left, self.torn, self.dead = n, torn, False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in COUNTED and name != "close":
            return real

        def operation(*arguments: Any, **options: Any) -> Any:
            if name == "close":  # a dead process closes its files
                return real(*arguments, **options)
            if self.dead:
                raise Killed
            self.left -= 1
            if self.left == 0:
                self.dead = True
                if self.torn and name in ("write", "pwrite"):
                    descriptor, data, *rest = arguments
                    # A header slot is mostly padding: less than its contents must be written.
                    real(descriptor, memoryview(data)[: min(len(data) // 2, 700)], *rest)
                raise Killed
            return real(*arguments, **options)

        return operation


def deaths(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Iterator[None]:
    """Run until a run survives; yields after each death."""
    for torn in (False, True):
        for n in range(1, 1000):
            double = DyingOS(n, torn)
            with monkeypatch.context() as patch:
                patch.setattr(stores, "_SYNC_EVERY", 4096)
                patch.setattr(stores, "os", double)
                patch.setattr(rewrapping, "os", double)
                try:
                    run()
                except Killed:
                    assert double.dead
            yield
            if not double.dead:
                break
        else:
            pytest.fail("it never ends")


@pytest.mark.threat("SEAL-10")
@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "named temporary"])
def test_a_kill_while_sealing_leaves_the_old_file_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: SigningKey, identity: Identity, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # as where the file system has no unnamed files
    path = tmp_path / "m"
    options: dict[str, Any] = {"recipients": [identity.recipient], "sign": owner}
    sealed.save_file({"w": np.zeros(20000)}, path, **options)
    before, seen = path.read_bytes(), set()
    for _ in deaths(monkeypatch, lambda: sealed.save_file({"w": np.ones(20000)}, path, **options)):
        found = sealed.load_file(path, identity=identity, signed_by=owner.verifying_key)["w"]
        seen.add(float(found[0]))
        assert found.tobytes() == np.full(20000, found[0]).tobytes()
        assert (path.read_bytes() == before) == (found[0] == 0)
        if found[0]:
            path.write_bytes(before)
        if unnamed:
            # At most the complete file under its temporary name, between link and rename.
            left = [other for other in tmp_path.iterdir() if other != path]
            assert len(left) <= 1
            for other in left:
                sealed.public_facts(other)
                other.unlink()
    assert seen == {0.0, 1.0}


@pytest.mark.threat("SEAL-10")
def test_a_kill_while_unsealing_leaves_no_plaintext(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: SigningKey, identity: Identity
) -> None:
    path, target = tmp_path / "m", tmp_path / "out"
    sealed.save_file({"w": np.ones(20000)}, path, recipients=[identity.recipient], sign=owner)
    complete = None

    def run() -> None:
        sealed.unseal_file(path, target, identity=identity, signed_by=owner.verifying_key)

    for _ in deaths(monkeypatch, run):
        for other in tmp_path.iterdir():
            if other != path:
                complete = complete or other.read_bytes()
                assert other.read_bytes() == complete
                assert other.stat().st_mode & 0o777 == 0o600
                other.unlink()
    assert complete is not None


@pytest.mark.threat("SEAL-10")
@pytest.mark.parametrize("garbled", [False, True])
def test_a_kill_while_rewrapping_leaves_a_file_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: SigningKey, identity: Identity, other: Identity,
    garbled: bool,
) -> None:  # fmt: skip
    """For the old recipient or the new one, with the same digest; and it can be rewrapped again.

    ``garbled``: half a sector of the slot that was being written is lost too.
    """
    path = tmp_path / "m"
    digest = sealed.save_file({"w": np.ones(2000)}, path, recipients=[identity.recipient], sign=owner)
    fresh, opened_by = path.read_bytes(), set()
    for _ in deaths(monkeypatch, lambda: sealed.rewrap(path, identity=identity, recipients=[other.recipient])):
        data = bytearray(path.read_bytes())
        if garbled and any(data[61440:61448]):
            live = sealed.public_facts(path).slot.raw
            idle = 0 if data[28672 : 28672 + len(live)] == live else 28672
            data[idle + 256 : idle + 512] = bytes(256)
            path.write_bytes(data)
        assert sealed.public_facts(path).digest == digest
        for name, who in (("old", identity), ("new", other)):
            try:
                assert sealed.load_file(path, identity=who, expect=digest)["w"].sum() == 2000
            except NoRecipient:
                continue
            opened_by.add(name)
            sealed.rewrap(path, identity=who, recipients=[identity.recipient])
            assert sealed.load_file(path, identity=identity, expect=digest)["w"].sum() == 2000
            break
        else:
            pytest.fail("nobody opens it")
        path.write_bytes(fresh)
    assert opened_by == {"old", "new"}


class FailingOS:
    """``os`` whose n-th write or sync says that the disk is full or broken."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("write", "fsync", "fdatasync", "link", "replace"):
            return real

        def operation(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        return operation


def test_a_failure_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: SigningKey, identity: Identity
) -> None:
    path, failures = tmp_path / "m", 0
    for n in range(1, 100):
        try:
            with monkeypatch.context() as patch:
                patch.setattr(stores, "_SYNC_EVERY", 4096)
                patch.setattr(stores, "os", FailingOS(n))
                sealed.save_file({"w": np.ones(2000)}, path, recipients=[identity.recipient], sign=owner)
        except StorageError as error:
            failures += 1
            assert "No space left" in str(error)
            # The sync of the folder comes after the rename: then the new file is there already.
            assert list(tmp_path.iterdir()) in ([], [path])
            path.unlink(missing_ok=True)
        else:
            break
    assert failures >= 6
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", ["missing", "folder", "fifo"])
def test_what_is_no_file_is_a_storage_error_or_refused(tmp_path: Path, identity: Identity, what: str) -> None:
    path = tmp_path / "m"
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    with pytest.raises((StorageError, SealedError)):
        sealed.load_file(path, identity=identity, expect=bytes(32))


@pytest.mark.threat("SEAL-10")
@pytest.mark.parametrize("garbled", [0, 28672])
def test_a_kill_while_a_killed_rewrap_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: SigningKey, identity: Identity, garbled: int
) -> None:
    """One slot is lost already, so the next rewrap must not begin with the other one."""
    path = tmp_path / "m"
    digest = sealed.save_file({"w": np.ones(2000)}, path, recipients=[identity.recipient], sign=owner)
    data = bytearray(path.read_bytes())
    data[61440:61448] = rewrapping.JOURNAL
    data[garbled + 256 : garbled + 512] = bytes(256)
    path.write_bytes(data)
    for _ in deaths(monkeypatch, lambda: sealed.rewrap(path, identity=identity, recipients=[identity.recipient])):
        assert sealed.load_file(path, identity=identity, expect=digest)["w"].sum() == 2000
        path.write_bytes(data)


class BadDiskOS:
    """``os`` whose background syncs fail, and whose last one does not: the kernel reports a lost page once."""

    def __getattr__(self, name: str) -> Any:
        return self.fail if name == "fdatasync" else getattr(os, name)

    def fail(self, descriptor: int) -> None:
        raise OSError(5, "Input/output error")


def test_a_page_that_was_lost_in_the_background_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: SigningKey, identity: Identity
) -> None:
    monkeypatch.setattr(stores, "_SYNC_EVERY", 65536)  # one sync, behind the header: only commit can see it
    monkeypatch.setattr(stores, "os", BadDiskOS())
    with pytest.raises(StorageError, match="Input/output"):
        sealed.save_file({"w": np.ones(10)}, tmp_path / "m", recipients=[identity.recipient], sign=owner)
    assert list(tmp_path.iterdir()) == []
