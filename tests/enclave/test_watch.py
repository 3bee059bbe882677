"""Peers of open channels: asked about in the background, ended when revoked, and not by an outage alone."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from isolate.enclave.watch import EVERY, FORGET, Watch
from isolate.errors import AppraisalRefused, ResultRefused, ServiceUnavailable
from isolate.messages.attest import PeerStandings


class World:
    """A service in hand: what it answers, what it was asked, and two clocks."""

    def __init__(self) -> None:
        self.codes: dict[bytes, str] = {}
        self.asked: list[list[bytes]] = []
        self.error: Exception | None = None
        self.now, self.clock = 1000, 0.0
        self.watch = Watch(self.ask, now=lambda: self.now, clock=lambda: self.clock, background=False)

    def ask(self, instances: list[bytes]) -> PeerStandings:
        self.asked.append(instances)
        if self.error is not None:
            raise self.error
        return PeerStandings([self.codes.get(one, "") for one in instances], 60, self.now)

    def look(self, peer: Any, after: float = EVERY) -> str:
        self.clock += after
        try:
            self.watch.recheck(peer)
        except ResultRefused as error:
            return error.code
        return ""


def peer(number: int, expires: int = 1000) -> Any:
    return SimpleNamespace(result=SimpleNamespace(instance=bytes([number]) * 32, expires=expires))


def test_one_question_is_about_all_peers_and_asked_no_more_often_than_it_must() -> None:
    world, peers = World(), [peer(1), peer(2), peer(3)]
    for one in peers:
        assert world.look(one, after=0) == ""
    assert [len(one) for one in world.asked] == [1]
    assert world.look(peers[0]) == ""
    assert world.asked[-1] == [one.result.instance for one in peers]
    # What no channel asks about any more is forgotten.
    world.look(peers[0], after=FORGET)
    assert world.asked[-1] == [peers[0].result.instance]


@pytest.mark.threat("SVC-74")
def test_a_revoked_peer_is_refused_and_the_others_go_on() -> None:
    world, good, bad = World(), peer(1), peer(2)
    for one in (good, bad):
        assert world.look(one) == ""
    world.codes[bad.result.instance] = "measurement_revoked"
    assert world.look(bad) == "measurement_revoked"
    assert world.look(good) == ""
    # Admitted again (an owner who erred), a new channel is not refused for ever.
    world.codes.clear()
    assert world.look(bad) == ""


@pytest.mark.threat("SVC-74")
def test_an_enclave_that_is_refused_itself_ends_its_channels() -> None:
    world = World()
    assert world.look(peer(1)) == ""
    world.error = AppraisalRefused("revoked", code="appraisal_revocation")
    assert world.look(peer(1)) == "appraisal_revocation"


@pytest.mark.threat("SVC-74")
def test_an_outage_ends_a_channel_only_after_the_policys_limit() -> None:
    world, one = World(), peer(1, expires=1000)
    assert world.look(one) == ""
    world.error = ServiceUnavailable("away")
    world.now = 1060
    assert world.look(one) == ""
    world.now = 1061
    assert world.look(one) == "attestation_stale"
    world.error = None
    assert world.look(one) == ""


def test_a_channel_never_waits_for_the_service() -> None:
    asked, answer = threading.Event(), threading.Event()

    def ask(instances: list[bytes]) -> PeerStandings:
        asked.set()
        assert answer.wait(10)
        return PeerStandings(["slot_retired" for _ in instances], 60, 0)

    watch, one = Watch(ask, now=lambda: 0), peer(1)
    watch.recheck(one)
    assert asked.wait(10)
    watch.recheck(one)
    answer.set()
    with pytest.raises(ResultRefused):
        while True:
            watch.recheck(one)


@pytest.mark.threat("SVC-74")
def test_a_courier_that_drops_every_answer_gains_the_least_and_a_thread_that_cannot_start_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, one = World(), peer(1, expires=1000)
    world.error = ServiceUnavailable("dropped")
    assert world.look(one) == ""
    world.now = 1001
    assert world.look(one) == "attestation_stale"

    def fail(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    clock = [0.0]
    watch = Watch(lambda _: PeerStandings(["slot_retired"], 60, 0), now=lambda: 1001, clock=lambda: clock[0])
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail)
        with pytest.raises(ResultRefused):
            watch.recheck(one)
    # It asks again as soon as it can.
    with pytest.raises(ResultRefused, match="no longer stands"):
        while True:
            clock[0] += EVERY
            with suppress_stale():
                watch.recheck(one)


class suppress_stale:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return isinstance(error, ResultRefused) and error.code == "attestation_stale"
