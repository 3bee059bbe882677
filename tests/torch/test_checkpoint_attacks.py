"""Attacks on a checkpoint's folder. Those that succeed on stock torch are first run there, as the control."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from isolate import Identity, SigningKey, sealed
from isolate.crypto.kem import Recipient
from isolate.crypto.secret import Secret
from isolate.errors import (
    IsolateError,
    MalformedError,
    NoRecipient,
    NotSealed,
    RolledBack,
    SealedError,
    StorageError,
    Tampered,
    Truncated,
    UnauthenticatedOrigin,
)
from isolate.sealed import stores

torch = pytest.importorskip("torch", reason="torch is an extra: pip install 'isolate-confidential[torch]'")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension  # noqa: E402
from torch.distributed.checkpoint.filesystem import SerializationFormat  # noqa: E402
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata  # noqa: E402

from isolate.torch import checkpoint, checkpoint_place, checkpoint_writer  # noqa: E402
from isolate.torch.checkpoint import SealedStorageReader, SealedStorageWriter  # noqa: E402
from isolate.torch.checkpoint_manifest import CheckpointManifest, Chunk, RankFile, TensorRow  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAME, CANARY = "secret.layer.weight", b"canary in the weights, 32 bytes."


def weights() -> Any:
    """A tensor of 32 KiB that is the canary over and over."""
    return torch.frombuffer(bytearray(CANARY * 1024), dtype=torch.uint8)


def state(value: int = 1) -> dict[str, Any]:
    return {NAME: weights(), "v": torch.full((4, 2), float(value)), "note": "secret note", "step": value}


def empty() -> dict[str, Any]:
    return {NAME: torch.zeros(32 * 1024, dtype=torch.uint8), "v": torch.zeros(4, 2), "note": "", "step": 0}


def all_bytes(folder: Path) -> bytes:
    return b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def writer(run: Path, owner: SigningKey, identity: Identity) -> Callable[..., SealedStorageWriter]:
    def make(path: Path = run, **options: Any) -> SealedStorageWriter:
        return SealedStorageWriter(
            path, **({"recipients": [identity.recipient], "sign": owner, "threads": 1} | options)
        )

    return make


@pytest.fixture
def reader(run: Path, owner: SigningKey, identity: Identity) -> Callable[..., SealedStorageReader]:
    def make(path: Path = run, **options: Any) -> SealedStorageReader:
        pins = {"identity": identity, "signed_by": owner.verifying_key, "threads": 1}
        return SealedStorageReader(path, **(pins | options))

    return make


def refused(reader: SealedStorageReader) -> IsolateError:
    """What loading is refused with; nothing of the state dict has changed then, but what was wiped."""
    found = empty()
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(found, storage_reader=reader)
    error = checkpoint.refusal(caught.value)
    assert error is not None, str(caught.value)
    assert not found[NAME].any() and not found["v"].any() and (found["note"], found["step"]) == ("", 0)
    return error


def save(writer: SealedStorageWriter, value: int = 1) -> None:
    dcp.save(state(value), storage_writer=writer)


class Mask(StreamTransformExtension):  # type: ignore[misc]
    """A toy in the place of an encryption, as torch's extensions take one."""

    @staticmethod
    def registry_name() -> str:
        return "mask"

    @staticmethod
    def from_descriptor(version: str) -> Mask:
        return Mask()

    def get_descriptor(self) -> str:
        return "mask/1"

    def transform_to(self, output: Any) -> Any:
        class Masked(io.BytesIO):
            def close(self) -> None:
                if not self.closed:
                    output.write(bytes(byte ^ 0x5A for byte in self.getvalue()))
                    output.flush()
                super().close()

        return Masked()

    def transform_from(self, input: Any) -> Any:
        return io.BytesIO(bytes(byte ^ 0x5A for byte in input.read()))


# What succeeds on stock torch


@pytest.mark.threat("CKPT-1")
def test_names_shapes_and_values_in_the_clear(tmp_path: Path, run: Path, writer: Any) -> None:
    stock = tmp_path / "stock"
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(stock, _extensions=[Mask()]))
    assert CANARY not in all_bytes(stock), "the extension works"
    assert NAME.encode() in all_bytes(stock) and b"note" in all_bytes(stock), "the control: names are in .metadata"
    save(writer())
    found = all_bytes(run)
    for word in (NAME.encode(), b"layer", b"note", CANARY, b"secret", b"F32", b"torch", b"float32"):
        assert word not in found


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.threat("CKPT-2")
def test_metadata_that_runs_code_when_it_is_read(tmp_path: Path, run: Path, writer: Any, reader: Any) -> None:
    stock, marker = tmp_path / "stock", tmp_path / "it ran"
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(stock))
    evil = pickle.dumps(Payload(marker))
    (stock / ".metadata").write_bytes(evil)
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load(empty(), storage_reader=dcp.FileSystemReader(stock))
    assert marker.exists(), "the control: stock torch ran it"
    marker.rmdir()
    save(writer())
    manifest = (run / "checkpoint.sealed").read_bytes()
    (run / "checkpoint.sealed").write_bytes(evil)
    assert type(refused(reader())) is NotSealed
    (run / "checkpoint.sealed").write_bytes(manifest)
    (run / ".metadata").write_bytes(evil)
    assert type(refused(reader())) is NotSealed
    assert not marker.exists()


@pytest.mark.threat("CKPT-2")
def test_a_value_that_runs_code_when_it_is_loaded(tmp_path: Path, writer: Any, reader: Any) -> None:
    stock, marker = tmp_path / "stock", tmp_path / "it ran"
    dcp.save({"note": Payload(marker)}, storage_writer=dcp.FileSystemWriter(stock))
    dcp.load({"note": None}, storage_reader=dcp.FileSystemReader(stock))
    assert marker.exists(), "the control: stock torch ran it"
    marker.rmdir()
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.save({"note": Payload(marker)}, storage_writer=writer())
    assert "Payload" in str(checkpoint.refusal(caught.value))
    assert not marker.exists()


@pytest.mark.threat("CKPT-3")
def test_a_format_that_goes_round_the_encryption(tmp_path: Path, run: Path, writer: Any) -> None:
    stock = tmp_path / "stock"
    plain = dcp.FileSystemWriter(stock, _extensions=[Mask()], serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save({NAME: weights()}, storage_writer=plain)
    assert CANARY in all_bytes(stock), "the control: not a word, and plaintext on the disk"
    with pytest.raises(TypeError):
        writer(serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save({NAME: weights()}, storage_writer=writer())
    assert CANARY not in all_bytes(run)


@pytest.mark.threat("CKPT-4")
def test_a_plain_checkpoint_in_its_place(tmp_path: Path, run: Path, writer: Any, reader: Any) -> None:
    stock = tmp_path / "stock"
    dcp.save(state(9), storage_writer=dcp.FileSystemWriter(stock))
    registry = ExtensionRegistry()
    registry.register(Mask)
    found = empty()
    dcp.load(found, storage_reader=dcp.FileSystemReader(stock, _extension_registry=registry))
    assert found["step"] == 9, "the control: a reader with the extension loads what was never encrypted"
    assert type(refused(reader(stock))) is NotSealed
    save(writer())
    for name in os.listdir(stock):  # noqa: PTH208
        shutil.copy(stock / name, run / name)
        assert type(refused(reader())) is NotSealed, name
        (run / name).unlink()
    with pytest.raises(dcp.api.CheckpointException) as caught:
        save(writer(stock, overwrite=True))
    assert type(checkpoint.refusal(caught.value)) is NotSealed
    dcp.load(empty(), storage_reader=reader())


# What is peculiar to many files


@pytest.fixture
def saved(world: Any, part: Any, writer: Any) -> Callable[..., None]:
    """Saves by two ranks: rank r holds rows 2r and 2r+1 of v."""

    def make(value: int = 1, path: Path | None = None, **options: Any) -> None:
        whole = torch.full((4, 2), float(value))
        states = [state(value) | {"v": part(whole, (2 * rank, 0), (2, 2))} for rank in range(2)]
        where = {} if path is None else {"path": path}
        world.save(states, [writer(**where, **options) for _ in states])

    return make


def ranks(run: Path) -> list[Path]:
    return sorted(run.glob("*/rank-*.sealed"))


def swapped(run: Path, other: Path) -> None:
    one, two = ranks(run)
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def doubled(run: Path, other: Path) -> None:
    one, two = ranks(run)
    shutil.copy(one, two)


def replaced(run: Path, other: Path) -> None:
    for mine, theirs in zip(ranks(run), ranks(other), strict=True):
        shutil.copy(theirs, mine)


def flipped(run: Path, other: Path) -> None:
    for path in ranks(run):
        raw = bytearray(path.read_bytes())
        raw[65536] ^= 1  # the first byte of data
        path.write_bytes(raw)


def added(run: Path, other: Path) -> None:
    shutil.copy(ranks(run)[1], ranks(run)[1].with_name("rank-00002.sealed"))


def cut(run: Path, other: Path) -> None:
    with ranks(run)[0].open("rb+") as file:
        file.truncate(file.seek(0, 2) - 1)


def all_of_it(run: Path, other: Path) -> None:
    shutil.copy(ranks(other)[0], run / "checkpoint.sealed")


ATTACKS: dict[str, tuple[Callable[[Path, Path], object], tuple[type[IsolateError], ...]]] = {
    "the ranks' files swapped": (swapped, (RolledBack, Truncated)),
    "one rank's file twice": (doubled, (RolledBack, Truncated)),
    "the ranks' files of an older save": (replaced, (RolledBack,)),
    "a bit of each rank's data": (flipped, (Tampered,)),
    "one file more": (added, (Tampered,)),
    "a file missing": (lambda run, _: ranks(run)[1].unlink(), (Truncated,)),
    "a file cut": (cut, (Truncated,)),
    "the files without their manifest": (lambda run, _: (run / "checkpoint.sealed").unlink(), (Truncated,)),
    "a rank's file as the manifest": (all_of_it, (NoRecipient,)),
    "the folder of the files missing": (lambda run, _: shutil.rmtree(ranks(run)[0].parent), (StorageError,)),
    "another file beside the manifest": (lambda run, _: (run / "model.py").write_text("x"), (Tampered,)),
    "weights beside the manifest": (lambda run, _: (run / "model.safetensors").write_text("x"), (NotSealed,)),
    "an empty folder": (lambda run, _: shutil.rmtree(run) or run.mkdir(), (NotSealed,)),
}  # type: ignore[dict-item, func-returns-value]


@pytest.mark.threat("CKPT-5")
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_changed_checkpoint_is_refused(attack: str, tmp_path: Path, run: Path, saved: Any, reader: Any) -> None:
    other = tmp_path / "older"
    saved(value=7, path=other, epoch=1)
    saved(value=8, epoch=2)
    change, expected = ATTACKS[attack]
    change(run, other)
    assert type(refused(reader())) in expected


@pytest.mark.threat("CKPT-5")
def test_another_manifest_of_the_same_owner_does_not_open_these_files(
    tmp_path: Path, run: Path, saved: Any, reader: Any
) -> None:
    other = tmp_path / "older"
    saved(value=7, path=other, epoch=1)
    saved(value=8, epoch=2)
    shutil.copy(other / "checkpoint.sealed", run / "checkpoint.sealed")
    assert isinstance(refused(reader()), SealedError | IsolateError)
    # With the files under the name that it gives them.
    ranks(run)[0].parent.rename(run / ranks(other)[0].parent.name)
    assert type(refused(reader())) is RolledBack


@pytest.mark.threat("CKPT-6")
def test_an_older_or_a_strangers_checkpoint(
    run: Path, saved: Any, reader: Any, stranger: SigningKey, identity: Identity
) -> None:
    saved(value=7, epoch=1)
    assert type(refused(reader(expect=sealed.Epoch(2)))) is RolledBack
    assert type(refused(reader(expect=bytes(32)))) is RolledBack
    assert type(refused(reader(signed_by=stranger.verifying_key))) is UnauthenticatedOrigin
    assert type(refused(reader(signed_by=None))) is UnauthenticatedOrigin
    assert type(refused(reader(identity=Identity.generate()))) is NoRecipient


@pytest.mark.threat("CKPT-6")
def test_each_rank_is_shown_another_checkpoint(
    tmp_path: Path, run: Path, saved: Any, reader: Any, world: Any, part: Any
) -> None:
    """Both genuine: half of the model would be of one step, half of another."""
    other = tmp_path / "older"
    saved(value=7, path=other, epoch=1)
    saved(value=8, epoch=2)
    states = [empty() | {"v": part(torch.zeros(4, 2), (2 * rank, 0), (2, 2))} for rank in range(2)]
    with pytest.raises(RolledBack, match="different ones"):
        world.load(states, [reader(), reader(other)])


# While it is saved: who is between the ranks


@pytest.mark.threat("CKPT-8")
def test_no_key_travels_between_the_ranks(writer: Any, world: Any, identity: Identity) -> None:
    sent = []

    def between(what: str, value: Any) -> Any:
        sent.append(pickle.dumps([plan.storage_data for plan in value] if what == "plans" else value))
        return value

    one = writer()
    seeds = []
    real = one._bind
    one._bind = lambda id, seed, *rest: seeds.append(bytes(seed.expose())) or real(id, seed, *rest)
    world.save([state(), state()], [one, writer()], between)
    assert len(sent) == 2 and len(seeds) == 1
    assert all(seeds[0] not in message for message in sent)


@pytest.mark.threat("CKPT-8")
def test_an_offer_that_somebody_put_between_is_refused(
    writer: Any, world: Any, stranger: SigningKey, run: Path
) -> None:
    """The ranks would seal their parts to a key of the attacker's."""
    thief = Identity.generate()

    def between(what: str, value: Any) -> Any:
        if what == "plans":
            for plan in value:
                offer = evolve(plan.storage_data.offer, recipient=thief.recipient.raw)
                object.__setattr__(plan, "storage_data", evolve(plan.storage_data, offer=offer))
        return value

    with pytest.raises(UnauthenticatedOrigin):
        world.save([state(), state()], [writer(), writer()], between)

    def signed_anew(what: str, value: Any) -> Any:
        if what == "plans":
            for plan in value:
                theirs = checkpoint_writer.party_of(stranger)
                offer = checkpoint_writer.Offer.make(
                    theirs, plan.storage_data.offer.id, thief.recipient, model_id="", epoch=0
                )
                object.__setattr__(plan, "storage_data", evolve(plan.storage_data, offer=offer))
        return value

    with pytest.raises(UnauthenticatedOrigin):
        world.save([state(), state()], [writer(), writer()], signed_anew)
    with pytest.raises(UnauthenticatedOrigin, match="model id and epoch"):
        world.save([state(), state()], [writer(epoch=1), writer(epoch=2)])
    assert not list(run.rglob("*.sealed")) or not thief_can_open(run, thief)


def thief_can_open(run: Path, thief: Identity) -> bool:
    for path in run.rglob("*.sealed"):
        try:
            sealed.SealedReader(path, identity=thief, INSECURE_any_origin=True).close()
        except SealedError:
            continue
        return True
    return False


@pytest.mark.threat("CKPT-8")
def test_a_file_that_somebody_put_in_a_ranks_place_is_not_bound(
    writer: Any, world: Any, part: Any, stranger: SigningKey, run: Path
) -> None:
    """Anyone can seal to the offer, and the digest that a rank reports could be changed on its way."""

    def forged(sign: SigningKey, rank: int) -> Callable[[str, Any], Any]:
        offers = []

        def between(what: str, value: Any) -> Any:
            if what == "plans":
                offers.append(value[0].storage_data.offer)
                return value
            offer = offers[0]
            path = run / offer.id.hex() / "rank-00001.sealed"
            with sealed.SealedWriter(
                path, recipients=[Recipient(offer.recipient)], sign=sign,
                metadata={"checkpoint": offer.id.hex(), "rank": str(rank)},
            ) as writer:  # fmt: skip
                writer.add("t2,0:v", torch.zeros(2, 2))
            return [
                value[0],
                [evolve_result(result, evolve(result.storage_data, digest=writer.digest)) for result in value[1]],
            ]

        return between

    def parts() -> list[dict[str, Any]]:
        return [{"v": part(torch.ones(4, 2), (2 * rank, 0), (2, 2))} for rank in range(2)]

    for sign, rank, error in [(stranger, 1, UnauthenticatedOrigin), (writer()._party.sign, 0, Tampered)]:
        with pytest.raises(error):
            world.save(parts(), [writer(), writer()], forged(sign, rank))
    assert not (run / "checkpoint.sealed").exists()


def evolve_result(result: Any, report: Any) -> Any:
    return type(result)(result.index, result.size_in_bytes, report)


# Crashes


class Killed(BaseException):
    """The process is gone."""


class Dying:
    """A module whose n-th operation that changes the disk does not happen, nor any later one."""

    def __init__(self, module: Any, names: tuple[str, ...], count: dict[str, int]) -> None:
        self._module, self._names, self._count = module, names, count

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        if name not in self._names:
            return real

        def operation(*arguments: Any, **options: Any) -> Any:
            self._count["left"] -= 1
            if self._count["left"] <= 0:
                raise Killed
            return real(*arguments, **options)

        return operation


@pytest.mark.threat("CKPT-9")
def test_a_kill_while_saving_leaves_the_old_checkpoint_or_the_new(
    run: Path, saved: Any, reader: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved(value=1, epoch=1)
    before, seen = tmp_path / "before", set()
    shutil.copytree(run, before)
    n = 0
    while True:
        n += 1
        count = {"left": n}
        with monkeypatch.context() as patch:
            names = ("write", "fsync", "fdatasync", "link", "replace", "unlink")
            patch.setattr(stores, "os", Dying(os, names, count))
            patch.setattr(checkpoint_place, "shutil", Dying(shutil, ("rmtree",), count))
            patch.setattr(checkpoint_place, "_make", counted(checkpoint_place._make, count))
            with contextlib.suppress(Killed):
                saved(value=2, epoch=2, overwrite=True)
        found = empty()
        dcp.load(found, storage_reader=reader())
        assert found["v"].tolist() == [[float(found["step"])] * 2] * 4
        seen.add(found["step"])
        if count["left"] > 0:
            break
        shutil.rmtree(run)
        shutil.copytree(before, run)
    assert seen == {1, 2} and n > 20
    assert len(list(run.iterdir())) == 2, "what the old save and the killed ones left is gone"


def counted(real: Callable[..., Any], count: dict[str, int]) -> Callable[..., Any]:
    def operation(*arguments: Any) -> Any:
        count["left"] -= 1
        if count["left"] <= 0:
            raise Killed
        return real(*arguments)

    return operation


# Manifests that the owner would not write


GOOD = {
    "id": bytes(16), "files": (RankFile(0, bytes(32), 9),), "objects": (),
    "tensors": (TensorRow("w", "F32", (4, 2), None, (Chunk(0, (0, 0), (4, 2)),)),),
}  # fmt: skip


@pytest.mark.threat("CKPT-10")
@pytest.mark.parametrize(
    "change",
    [
        {"id": bytes(15)},
        {"files": ()},
        {"files": (RankFile(0, bytes(31), 9),)},
        {"files": (RankFile(0, bytes(32), 0),)},
        {"files": (RankFile(0, bytes(32), 9), RankFile(0, bytes(32), 9))},
        {"files": (RankFile(-1, bytes(32), 9), RankFile(0, bytes(32), 9))},
        {"tensors": GOOD["tensors"] * 2},
        {"tensors": (TensorRow("w", "X9", (4, 2), None, (Chunk(0, (0, 0), (4, 2)),)),)},
        {"tensors": (TensorRow("w", "F32", (4, 2), None, (Chunk(1, (0, 0), (4, 2)),)),)},
        {"tensors": (TensorRow("w", "F32", (4, 2), None, (Chunk(0, (0, 0), (3, 2)),)),)},
        {"tensors": (TensorRow("w", "F32", (4, 2), None, (Chunk(0, (1, 0), (4, 2)),)),)},
        {"tensors": (TensorRow("w", "F32", (4, 2), None, (Chunk(0, (0,), (4, 2)),)),)},
        {"tensors": (TensorRow("w", "F32", (4, 2), None, (Chunk(0, (0, 0), (2, 2)), Chunk(0, (0, 0), (2, 2)))),)},
        {"tensors": (TensorRow("w", "F32", (4, -2), None, (Chunk(0, (0, 0), (4, -2)),)),)},
        {"tensors": (TensorRow("w", "F32", (4, 2), (), (Chunk(0, (0, 0), (4, 2)),)),)},
    ],
)
def test_a_manifest_that_does_not_add_up_is_malformed(change: dict[str, Any]) -> None:
    def make(fields: dict[str, Any]) -> CheckpointManifest:
        return CheckpointManifest(key=Secret(bytes(32)), **fields)

    CheckpointManifest.parse(make(GOOD).encode())
    with pytest.raises(MalformedError):
        CheckpointManifest.parse(make(GOOD | change).encode())


@pytest.mark.threat("CKPT-10")
def test_a_rank_file_that_holds_another_tensor_than_the_manifest_says(
    writer: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint_writer._rows

    def lying(metadata: Metadata, entries: Any) -> Any:
        tensors, objects = real(metadata, entries)
        return tuple(evolve(row, dtype="I32") if row.name == "v" else row for row in tensors), objects

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_rows", lying)
        save(writer())
    assert type(refused(reader())) is MalformedError


def test_the_control_of_these_tests(writer: Any, reader: Any) -> None:
    save(writer())
    found = empty()
    dcp.load(found, storage_reader=reader())
    assert found["note"] == "secret note" and bytes(found[NAME].numpy())[:32] == CANARY
    assert isinstance(reader().read_metadata().state_dict_metadata[NAME], TensorStorageMetadata)
