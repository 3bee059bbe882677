"""Enclaves of one job start in any order: who comes first waits for the other, and a refusal is no absence."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from isolate import channel
from isolate.enclave import workload
from isolate.errors import HandshakeRefused


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    address = f"unix:{tmp_path / 'peer'}"
    monkeypatch.setenv("ISOLATE_LISTEN", address)
    monkeypatch.setenv("ISOLATE_PEER", address)
    monkeypatch.setattr(workload, "REACH_AFTER", 0.01)
    return address


def test_who_connects_before_the_peer_listens_waits_for_it(realm: Any, here: str) -> None:
    listening, connecting = realm.enclave(rank=0), realm.enclave(rank=1)
    taken: list[bytes] = []

    def listen() -> None:
        time.sleep(0.2)
        with listening.listen("gradients", rank=1) as listener, listener.accept() as peer:
            taken.append(bytes(peer.recv()))

    thread = threading.Thread(target=listen)
    thread.start()
    with connecting.connect("gradients", rank=0, timeout=20) as peer:
        peer.send(b"hello")
        thread.join(20)
    assert taken == [b"hello"]


def test_a_courier_with_nobody_behind_it_is_tried_again(
    realm: Any, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[str] = []
    real = channel.connect

    def connect(*arguments: Any, **options: Any) -> Any:
        attempts.append("")
        if len(attempts) < 3:
            raise HandshakeRefused("the peer went away during the handshake", code="peer_gone")
        return real(*arguments, **options)

    monkeypatch.setattr(channel, "connect", connect)
    enclave = realm.enclave(rank=1)
    with realm.enclave(rank=0).listen("gradients", rank=1) as listener:
        thread = threading.Thread(target=lambda: listener.accept().close())
        thread.start()
        enclave.connect("gradients", rank=0, timeout=20).close()
        thread.join(20)
    assert len(attempts) == 3


def test_a_refusal_is_not_tried_again(realm: Any, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[str] = []

    def connect(*_: Any, **__: Any) -> Any:
        attempts.append("")
        raise HandshakeRefused("another rank", code="peer_refused")

    monkeypatch.setattr(channel, "connect", connect)
    with pytest.raises(HandshakeRefused, match="another rank"):
        realm.enclave(rank=1).connect("gradients", rank=0, timeout=20)
    assert len(attempts) == 1
