"""Checkpoints of enclaves: registered with the service as they are saved, loaded only while they are in force."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from isolate.enclave import boot
from isolate.errors import (
    IsolateError,
    ReleaseRefused,
    RolledBack,
    ServiceUnavailable,
    UnauthenticatedOrigin,
    UsageError,
)

torch = pytest.importorskip("torch", reason="torch is an extra: pip install 'isolate-confidential[torch]'")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from isolate.torch import checkpoint, checkpoint_place  # noqa: E402
from isolate.torch.checkpoint import SealedStorageReader, SealedStorageWriter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ASSET = "acme/run"


@pytest.fixture(autouse=True)
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "_quiet", False)


@pytest.fixture
def job(realm: Any, world: Any, part: Any, tmp_path: Path) -> Any:
    """Two enclaves of one job, which may read and write the asset."""
    return Job(realm, world, part, tmp_path / "run")


class Job:
    def __init__(self, realm: Any, world: Any, part: Any, path: Path) -> None:
        self.realm, self.world, self.part, self.path = realm, world, part, path
        realm.rule(ASSET, readers=("reader",), writers=("reader",))
        self.enclaves = [realm.enclave(rank=rank) for rank in range(2)]

    def states(self, value: float) -> list[dict[str, Any]]:
        whole = torch.full((4, 2), value)
        return [{"v": self.part(whole, (2 * rank, 0), (2, 2)), "step": value} for rank in range(2)]

    def save(self, epoch: int, between: Callable[[str, Any], Any] | None = None, signers: Any = None) -> None:
        writers = [
            SealedStorageWriter(self.path, sign=one, model_id=ASSET, epoch=epoch, overwrite=True, threads=1)
            for one in signers or self.enclaves
        ]
        self.world.save(self.states(float(epoch)), writers, between)

    def load(self) -> float:
        states = self.states(0.0)
        self.world.load(states, [SealedStorageReader(self.path, identity=one) for one in self.enclaves])
        assert all((state["v"].local == state["step"]).all() for state in states)
        return float(states[0]["step"])


def test_a_checkpoint_is_registered_and_loads_by_one_release_for_each_rank(job: Any) -> None:
    job.save(1)
    job.realm.carried.clear()
    assert job.load() == 1
    assert [route for route, _ in job.realm.carried].count("release") == 2
    job.save(2)
    assert job.load() == 2
    assert [entry["epoch"] for entry in job.realm.entries("register")] == [1, 2]
    names = {path.name for path in job.path.iterdir()}
    assert len(names) == 2 and "checkpoint.sealed" in names


@pytest.mark.threat("CKPT-6")
def test_the_operator_puts_an_older_checkpoint_back(job: Any, tmp_path: Path) -> None:
    job.save(1)
    shutil.copytree(job.path, tmp_path / "older")
    job.save(2)
    shutil.rmtree(job.path)
    shutil.copytree(tmp_path / "older", job.path)
    with pytest.raises(RolledBack, match="in force"):
        job.load()
    with pytest.raises(RolledBack, match="epoch"):
        job.save(2)


@pytest.mark.threat("CKPT-6")
def test_who_may_not_read_or_write_the_asset_does_not(job: Any) -> None:
    job.save(1)
    job.realm.rule(ASSET, readers=(), writers=())
    with pytest.raises(ReleaseRefused):
        job.load()
    with pytest.raises(ReleaseRefused):
        job.save(2)
    job.realm.rule(ASSET, readers=("reader",), writers=())
    assert job.load() == 1


@pytest.mark.threat("CKPT-8")
def test_an_enclave_of_another_job_takes_no_part(job: Any) -> None:
    """The same code in another job: its coordinator's offer is refused, and its file is not bound."""
    twin = job.realm.enclave(rank=0, job="acme/other")
    with pytest.raises(UnauthenticatedOrigin) as caught:
        job.save(1, signers=[twin, job.enclaves[1]])
    assert caught.value.code == "wrong_job"

    def offers(what: str, value: Any) -> Any:
        if what == "plans":  # as if the twin had taken the offer of the real coordinator
            from isolate.crypto.kem import Recipient
            from isolate.torch.checkpoint_parties import Offer, WorkloadParty

            theirs = WorkloadParty(job.realm.enclave(rank=1, job="acme/other"))
            offer = value[1].storage_data.offer
            own = Offer.make(theirs, offer.id, Recipient(offer.recipient), model_id=ASSET, epoch=1)
            object.__setattr__(value[1], "storage_data", evolve(value[1].storage_data, offer=own))
        return value

    with pytest.raises(UnauthenticatedOrigin) as caught:
        job.save(1, offers, signers=[job.enclaves[0], job.realm.enclave(rank=1, job="acme/other")])
    assert caught.value.code == "wrong_job"
    assert not (job.path / "checkpoint.sealed").exists()


@pytest.mark.threat("CKPT-8")
def test_a_stolen_token_makes_no_offer(job: Any) -> None:
    """The token and the digests of the keys are public: the offer is signed by a key that is not among them."""
    from isolate import SigningKey
    from isolate.crypto.signing import Purpose

    thief = SigningKey.generate()

    def between(what: str, value: Any) -> Any:
        if what == "plans":
            for plan in value:
                offer = plan.storage_data.offer
                message = offer._message(offer.id, offer.recipient, ASSET, 1)
                forged = evolve(
                    offer,
                    signer=thief.verifying_key.to_bytes(),
                    signature=thief.sign(Purpose.CHECKPOINT_OFFER, message),
                )
                object.__setattr__(plan, "storage_data", evolve(plan.storage_data, offer=forged))
        return value

    with pytest.raises(UnauthenticatedOrigin) as caught:
        job.save(1, between)
    assert caught.value.code == "key_not_attested"


class Killed(BaseException):
    pass


@pytest.mark.threat("CKPT-9")
def test_a_kill_before_or_after_it_is_registered_leaves_one_that_loads(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From when the service has the new one, it refuses the old one: so the new one must be there already."""
    job.save(1)
    seen = []
    for n in range(1, 20):
        count = {"left": n}

        def dying(real: Callable[..., Any], count: dict[str, int] = count) -> Callable[..., Any]:
            def operation(*arguments: Any, **options: Any) -> Any:
                count["left"] -= 1
                if count["left"] <= 0:
                    raise Killed
                return real(*arguments, **options)

            return operation

        epoch = len(job.realm.entries("register")) + 1
        with monkeypatch.context() as patch:
            place = checkpoint_place.CheckpointPlace
            for name in ("write", "remove", "sync"):
                patch.setattr(place, name, dying(getattr(place, name)))
            patch.setattr(job.realm, "courier", dying(job.realm.serve))
            with contextlib.suppress(Killed):
                job.save(epoch)
        loaded = job.load()
        assert loaded == len(job.realm.entries("register"))
        seen.append(loaded - epoch)
        if count["left"] > 0:
            break
    else:
        pytest.fail("it never ends")
    assert set(seen) == {-1.0, 0.0}
    job.save(epoch + 1)
    assert len(list(job.path.iterdir())) == 2, "what was interrupted is gone"


@pytest.mark.threat("CKPT-9")
def test_an_answer_of_the_service_that_is_lost(job: Any) -> None:
    job.save(1)

    def lost(route: str, body: bytes) -> tuple[int, bytes]:
        answer: tuple[int, bytes] = job.realm.serve(route, body)
        if route == "register":
            raise ServiceUnavailable("gone")
        return answer

    job.realm.courier = lost
    with pytest.raises(ServiceUnavailable):
        job.save(2)
    job.realm.courier = job.realm.serve
    assert job.load() == 2


def test_through_torch_itself(job: Any) -> None:
    one = job.enclaves[0]
    writer = SealedStorageWriter(job.path, sign=one, model_id=ASSET, epoch=1)
    dcp.save({"w": torch.ones(3)}, storage_writer=writer)
    found = {"w": torch.zeros(3)}
    dcp.load(found, storage_reader=SealedStorageReader(job.path, identity=one))
    assert found["w"].tolist() == [1, 1, 1]
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.save({"w": torch.ones(3)}, storage_writer=SealedStorageWriter(job.path, sign=one, model_id=ASSET))
    assert isinstance(checkpoint.refusal(caught.value), IsolateError)
    with pytest.raises(UsageError, match="model_id"):
        SealedStorageWriter(job.path, sign=one)
