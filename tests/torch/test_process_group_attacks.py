"""Who is let into a process group, and what a network in between sees and can do. A thread for each rank."""

from __future__ import annotations

import importlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve, frozen

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
dist = importlib.import_module("torch.distributed")

from isolate.channel import Attested, Expect  # noqa: E402
from isolate.cli.bench.ranks import Member, Ranks  # noqa: E402
from isolate.crypto import cbor  # noqa: E402
from isolate.crypto.signing import SigningKey  # noqa: E402
from isolate.errors import AppraisalRefused, ControlMissing, IsolateError, MalformedError, RankFailed  # noqa: E402
from isolate.torch import backend, links  # noqa: E402
from isolate.torch.process_group import IsolateProcessGroup  # noqa: E402
from isolate.torch.rendezvous import Hint  # noqa: E402

RANKS = Ranks()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for out of patience only."""
    monkeypatch.setattr(links, "GRACE", 0.1)


@frozen
class Given:
    """An identity as the attacker has it."""

    identity: Attested
    pins: Ranks

    def attested(self) -> Attested:
        return self.identity

    def expect(self, rank: int | None) -> Expect:
        return self.pins.expect(rank)


def meet(peers: list[Any], *, store: Any = None, timeout: float = 10.0, ranks: Any = ()) -> list[Any]:
    """A group of these identities: the groups, or what each end raised."""
    found: list[Any] = [None] * len(peers)
    place = store if store is not None else dist.HashStore()

    def one(rank: int) -> None:
        try:
            found[rank] = IsolateProcessGroup(
                place, rank, len(peers), peers=peers[rank], timeout=timeout, ranks=ranks or range(len(peers))
            )
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(peers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "hangs"
    return found


def other_job() -> Any:
    other = evolve(RANKS, job="other")
    return Given(other.attested(1), RANKS)


def other_rank() -> Any:
    return Given(RANKS.attested(2), RANKS)


def other_measurement() -> Any:
    """It is not admitted, so it has a result of another policy, of the same service, which does admit it."""
    other = evolve(RANKS, lineage="elsewhere", measurement=bytes([9]) * 48)
    return Given(other.attested(1), RANKS)


def other_service() -> Any:
    other = evolve(RANKS, issuer=SigningKey.generate())
    return Given(other.attested(1), RANKS)


def stolen_token() -> Any:
    """The token and key digests of rank 1, without its keys."""
    victim, thief = RANKS.attested(1), RANKS.attested(5)
    object.__setattr__(thief, "token", victim.token)
    object.__setattr__(thief, "keys", victim.keys)
    return Given(thief, RANKS)


IMPOSTORS = {
    other_job: "wrong_job",
    other_rank: "wrong_rank",
    other_measurement: "wrong_lineage",
    other_service: "result_signature",
    stolen_token: "evidence_refused",
}


@pytest.mark.threat("DIST-1")
@pytest.mark.parametrize("impostor", IMPOSTORS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("place", [0, 1])
def test_an_impostor_is_refused_by_name(impostor: Callable[[], Any], place: int) -> None:
    """Whether it connects (place 1) or is connected to (place 0, with the ranks swapped)."""
    peers: list[Any] = [RANKS.peers(0), impostor()]
    ranks = [0, 1]
    if place == 0:
        peers.reverse()
        ranks.reverse()
    honest = meet(peers, ranks=ranks)[1 - place]
    assert isinstance(honest, RankFailed) and honest.rank == 1
    assert honest.code in (IMPOSTORS[impostor], "result_refused", "key_not_attested"), honest.code


@pytest.mark.threat("DIST-1")
def test_a_wrong_measurement_gets_no_result_at_all() -> None:
    with pytest.raises(AppraisalRefused, match=r"measurement|register"):
        RANKS.attested(1, measured=bytes([9]) * 48)


@pytest.mark.threat("DIST-1")
@pytest.mark.parametrize("members", [(0, 1), (2, 1)], ids=["another name", "other members"])
def test_ranks_of_another_group_are_refused(members: tuple[int, ...]) -> None:
    """Same job, true ranks, but they mean another group."""
    store, found = dist.HashStore(), [None, None]

    def one(rank: int, ranks: tuple[int, ...], group: str) -> None:
        try:
            IsolateProcessGroup(store, rank, 2, peers=RANKS.peers(rank), timeout=1.5, ranks=ranks, group=group)
        except IsolateError as error:
            found[rank] = error

    threads = [
        threading.Thread(target=one, args=(0, (0, 1), "a")),
        threading.Thread(target=one, args=(1, members, "b")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(isinstance(one, RankFailed) for one in found), found


class Between:
    """A relay in front of every address that a rank publishes: the operator runs the store and the network."""

    def __init__(self, bend: Callable[[bytes], bytes] = lambda data: data) -> None:
        self.store, self.bend, self.seen = dist.HashStore(), bend, bytearray()
        self.armed = False

    def get(self, key: str) -> bytes:
        return self.store.get(key)

    def check(self, keys: list[str]) -> bool:
        return self.store.check(keys)

    def set(self, key: str, value: str) -> None:
        hint = Hint.parse(value)
        self.store.set(key, evolve(hint, control=self._front(hint.control), link=self._front(hint.link)).encode())

    def _front(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self._relay(address) for address in addresses if address.startswith("tcp:"))

    def _relay(self, address: str) -> str:
        host, port = address.removeprefix("tcp:").rsplit(":", 1)
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                one, _ = listener.accept()
                other = socket.create_connection((host, int(port)))
                for source, target in ((one, other), (other, one)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return f"tcp:127.0.0.1:{listener.getsockname()[1]}"

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.seen += data
                target.sendall(self.bend(data) if self.armed else data)
        except OSError:
            pass
        target.close()


@pytest.mark.threat("DIST-2")
def test_a_tap_finds_no_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOLATE_TRANSPORT", "tcp")
    tap = Between()
    groups = meet([RANKS.peers(0), RANKS.peers(1)], store=tap, timeout=10.0)
    secret = torch.frombuffer(bytearray(b"CANARY-IN-A-GRADIENT" * 4000), dtype=torch.int32)
    tasks = [groups[0].broadcast([secret]), groups[1].broadcast([torch.zeros_like(secret)])]
    tasks += [groups[0].send([secret], 1, 3), groups[1].recv([got := torch.zeros_like(secret)], 0, 3)]
    for task in tasks:
        task.wait()
    assert torch.equal(got, secret)
    assert len(tap.seen) > 160_000 and b"CANARY" not in tap.seen
    for group in groups:
        group.shutdown()


@pytest.mark.threat("DIST-2")
def test_a_relay_that_bends_a_byte_ends_the_group_on_both_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOLATE_TRANSPORT", "tcp")
    relay = Between(lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    groups = meet([RANKS.peers(0), RANKS.peers(1)], store=relay, timeout=5.0)
    relay.armed = True
    tensors = [torch.ones(100_000), torch.ones(100_000)]
    for group, tensor in zip(groups, tensors, strict=True):
        task = group.allreduce([tensor])
        with pytest.raises(RankFailed, match=r"rank [01] failed"):
            task.wait()


@pytest.mark.threat("DIST-1")
@pytest.mark.parametrize("place", [0, 1])
def test_a_relay_between_two_sessions_is_refused(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attested rank 2 stands where rank 1 should, with what rank 1 shows it: its own keys give it away.

    It connects (place 1), or is connected to (place 0, with the ranks swapped): so it gets between no two.
    """
    monkeypatch.setenv("ISOLATE_TRANSPORT", "tcp")
    twin = RANKS.attested(2)
    shown = RANKS.attested(1)
    # The relay's channel key is its own; the token, digests and signatures are those that rank 1 shows anybody.
    object.__setattr__(twin, "token", shown.token)
    object.__setattr__(twin, "keys", shown.keys)
    object.__setattr__(twin, "sign", shown.sign)
    peers: list[Any] = [RANKS.peers(0), Given(twin, RANKS)]
    ranks = [0, 1]
    if place == 0:
        peers.reverse()
        ranks.reverse()
    honest = meet(peers, ranks=ranks)[1 - place]
    assert isinstance(honest, RankFailed) and honest.rank == 1
    assert honest.code == "key_not_attested", honest.code


RUBBISH = {
    "no record": ("control", b"\xff" * 20),
    "a long one": ("control", bytes(300)),
    "no such message": ("control", cbor.encode({"kind": "beaten", "number": 0, "code": ""})),
    "a short header": ("link", b"short"),
    "another header": ("link", bytes(20)),
    "much of it": ("link", bytes(100_000)),
}


@pytest.mark.threat("DIST-7")
@pytest.mark.parametrize("what", RUBBISH)
def test_an_attested_rank_that_talks_rubbish_is_named_on_every_rank(what: str) -> None:
    groups = meet([RANKS.peers(rank) for rank in range(3)], timeout=10.0)
    where, message = RUBBISH[what]
    hostile = groups[2]._links
    (hostile._control[0] if where == "control" else hostile.link(0).channel).send(message)
    began = time.monotonic()
    for task in [group.allreduce([torch.ones(100_000)]) for group in groups[:2]]:
        with pytest.raises(RankFailed, match="rank 2 failed") as caught:
            task.wait()
        assert caught.value.rank == 2
    assert time.monotonic() - began < 5
    for group in groups:
        group.shutdown()


@pytest.mark.threat("DIST-3")
@pytest.mark.parametrize("value", ["", "zz", "00", "a0", Hint("", ("tcp:host:99999",), ()).encode()])
def test_what_the_store_says_is_only_ever_an_address(value: str) -> None:
    with pytest.raises(MalformedError):
        Hint.parse(value)


@pytest.mark.threat("DIST-3")
def test_a_store_that_sends_a_rank_elsewhere() -> None:
    """To rank 2 instead of rank 1: the channel is pinned, whatever the store says."""

    class Swapped:
        def __init__(self) -> None:
            self.store = dist.HashStore()

        def set(self, key: str, value: str) -> None:
            self.store.set({"hint/0": "hint/1", "hint/1": "hint/0"}.get(key, key), value)

        def get(self, key: str) -> bytes:
            return self.store.get(key)

        def check(self, keys: list[str]) -> bool:
            return self.store.check(keys)

    found = meet([RANKS.peers(0), RANKS.peers(1), RANKS.peers(2)], store=Swapped(), timeout=1.5)
    assert all(isinstance(one, RankFailed) for one in found), found


@pytest.mark.threat("DIST-4")
def test_an_unattested_process_is_told_how_to_start() -> None:
    backend._current.clear()
    with pytest.raises(ControlMissing, match="isolate launch"):
        backend._peers(None, default=True)
    with pytest.raises(IsolateError, match="Workload"):
        backend._peers(object(), default=True)
    assert not backend._current


@pytest.mark.threat("DIST-1")
def test_the_second_link_must_be_of_the_same_instance() -> None:
    """A new enclave in the slot of a rank does not take over half of its channels."""
    one, other = RANKS.attested(1), RANKS.attested(1)

    class Changing:
        def attested(self) -> Attested:
            return one

        def expect(self, rank: int | None) -> Expect:
            return RANKS.expect(rank)

    real = links.connect

    def connect(address: str, *, identity: Any, purpose: str, **rest: Any) -> Any:
        return real(address, identity=other if purpose == "torch/link" else identity, purpose=purpose, **rest)

    patch = pytest.MonkeyPatch()
    patch.setattr(links, "connect", connect)
    try:
        found = meet([RANKS.peers(0), Changing()])
    finally:
        patch.undo()
    assert isinstance(found[0], RankFailed) and found[0].code == "wrong_instance", found


def test_members_are_what_the_protocol_asks_for() -> None:
    assert isinstance(RANKS.peers(0), links.Peers) and isinstance(RANKS.peers(0), Member)
