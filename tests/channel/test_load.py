"""Many channels, dead peers, slow readers, and what a relay in the operator's hands has on its disk."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isolate import channel
from isolate.channel import Holder
from isolate.crypto.signing import SigningKey
from isolate.errors import ChannelError, ChannelTruncated, HandshakeRefused

Both = Callable[[Callable[[], Any], Callable[[], Any]], tuple[Any, Any]]


class Recorder:
    """The operator's relay: passes everything on, and keeps it."""

    def __init__(self, path: str, target: str) -> None:
        self.seen = [bytearray(), bytearray()]
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._target = target
        self._open = [self._listener]
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()

    def _serve(self) -> None:
        inside, _ = self._listener.accept()
        outside = socket.socket(socket.AF_UNIX)
        outside.connect(self._target)
        self._open += [inside, outside]
        for place, (source, sink) in enumerate(((inside, outside), (outside, inside))):
            thread = threading.Thread(target=self._pass, args=(place, source, sink), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass(self, place: int, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            self.seen[place] += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def close(self) -> bytes:
        for thread in list(self._threads):
            thread.join(5)
        for one in self._open:
            one.close()
        return bytes(self.seen[0] + self.seen[1])


@pytest.mark.threat("CHAN-26")
@pytest.mark.parametrize("profile", ["peer", "client"])
def test_a_capture_holds_no_plaintext_and_no_identity(
    world: Any, tmp_path: Path, together: Both, profile: str
) -> None:
    canary = os.urandom(32)
    key, purpose = SigningKey.generate(), "a secret purpose"
    identity = world.attested(0) if profile == "peer" else Holder(key)
    there = world.attested(1)
    options = {"identity": there, "expect": world.expect(0) if profile == "peer" else None}
    with channel.listen(
        f"unix:{tmp_path}/inner", profile=profile, purpose="a secret purpose", **options
    ) as listener:
        recorder = Recorder(f"{tmp_path}/outer", f"{tmp_path}/inner")
        one, other = together(
            lambda: channel.connect(
                f"unix:{tmp_path}/outer", identity=identity, expect=world.expect(1), purpose=purpose
            ),
            listener.accept,
        )
        for size in (1, 10_000):
            one.send(canary * size)
            assert other.recv() == canary * size
            other.send(canary * size)
            assert one.recv() == canary * size
        one.close()
        with pytest.raises(ChannelError):
            other.recv()
        other.close()
        capture = recorder.close()
    assert len(capture) > 640_000
    secrets = {
        "canary": canary,
        "canary in hex": canary.hex().encode(),
        "purpose": b"secret purpose",
        "the terms": b"least_sequence",
        "the job, in the terms": b"\x63job\x63job",
        "lineage": b"acme/train",
        "the responder's token": there.token[:40].encode(),
        "the responder's static key": there.curve.public,
    }
    if profile == "peer":
        secrets |= {
            "token": identity.token[:40].encode(),
            "static key": identity.curve.public,
            "signing key": identity.sign.verifying_key.ed25519,
            "keys digest": identity.keys.digest,
        }
    else:
        secrets["holder key"] = key.verifying_key.ed25519
    found = [name for name, value in secrets.items() if value in capture]
    assert found == []
    # The search can find: in a capture with any of them planted it does.
    assert all(value in capture + value for value in secrets.values())


def test_killed_in_the_middle_of_a_long_message(world: Any, tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/s", "tcp:127.0.0.1:0", f"shm:{tmp_path}/m"):
        with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=5) as listener:
            child = os.fork()
            if child == 0:
                try:
                    mine = channel.connect(
                        listener.address, identity=world.attested(0), expect=world.expect(1), timeout=5
                    )
                    while True:
                        mine.send(b"\x07" * (32 << 20))
                finally:
                    os._exit(1)
            with listener.accept(10) as other:
                buffer = bytearray(32 << 20)
                assert other.recv_into(buffer) == len(buffer)
                threading.Timer(0.1, os.kill, (child, signal.SIGKILL)).start()
                with pytest.raises(ChannelTruncated):
                    while True:
                        other.recv_into(buffer)
            os.waitpid(child, 0)


def test_half_open_connections_do_not_stop_a_listener(world: Any, tmp_path: Path) -> None:
    """Ten peers that connect and say nothing, with four accepting threads: honest peers get through."""
    address, stop = f"unix:{tmp_path}/s", threading.Event()
    served: list[bytes] = []
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=1) as listener:

        def serve() -> None:
            while not stop.is_set():
                try:
                    with listener.accept(0.2) as one:
                        served.append(bytes(one.recv()))
                except ChannelError:
                    continue

        threads = [threading.Thread(target=serve) for _ in range(4)]
        for thread in threads:
            thread.start()
        silent = [socket.socket(socket.AF_UNIX) for _ in range(10)]
        for sock in silent:
            sock.connect(f"{tmp_path}/s")
        for number in range(5):
            with channel.connect(address, identity=world.attested(0), expect=world.expect(1), timeout=10) as one:
                one.send(b"%d" % number)
                time.sleep(0.05)
        stop.set()
        for sock in silent:
            sock.close()
        for thread in threads:
            thread.join()
    assert sorted(served) == [b"%d" % number for number in range(5)]


@pytest.mark.slow
def test_a_thousand_channels_at_once(world: Any, tmp_path: Path) -> None:
    """All open together, each with its own binding; then one message back and forth on each."""
    import asyncio

    from isolate.channel import aio

    async def work() -> None:
        address = f"unix:{tmp_path}/s"
        async with await aio.listen(
            address, identity=world.attested(1), expect=world.expect(0), timeout=120
        ) as listener:
            mine = world.attested(0)

            async def serve() -> aio.Channel:
                return await listener.accept(120)

            async def dial() -> aio.Channel:
                return await aio.connect(address, identity=mine, expect=world.expect(1), timeout=120)

            serving = [asyncio.create_task(serve()) for _ in range(1000)]
            dialled = await asyncio.gather(*(dial() for _ in range(1000)))
            accepted = await asyncio.gather(*serving)
            assert len({one.binding for one in dialled}) == 1000
            assert {one.binding for one in dialled} == {one.binding for one in accepted}

            async def echo(one: aio.Channel) -> None:
                await one.send(await one.recv())

            async def ask(one: aio.Channel) -> None:
                data = os.urandom(1000)
                await one.send(data)
                assert await one.recv() == data

            await asyncio.gather(*map(echo, accepted), *map(ask, dialled))
            for one in (*dialled, *accepted):
                await one.close()

    asyncio.run(work())


@pytest.mark.slow
def test_a_thousand_refusals_leave_nothing_behind(world: Any, tmp_path: Path) -> None:
    """Descriptors are not lost over refused handshakes."""
    address = f"unix:{tmp_path}/s"
    stranger = world.attested(3)
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=5) as listener:

        def dial() -> None:
            with pytest.raises(HandshakeRefused):
                channel.connect(address, identity=stranger, expect=world.expect(1))

        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(1000):
            dialled = threading.Thread(target=dial)
            dialled.start()
            with pytest.raises(HandshakeRefused):
                listener.accept(5)
            dialled.join()
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
