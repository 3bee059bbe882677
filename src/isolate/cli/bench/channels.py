"""Channels against plain sockets by their best path, and against stdlib ssl with TLS 1.3, at the same sizes.

One process sends, another receives, each on a core of its own; every connection stays open all the time, and each
round measures each once. A throughput counts until the receiver says that it has all. Of round trips and
handshakes, which a busy machine only lengthens, each round takes the 10th percentile.

    >>> from isolate.cli.bench.channels import messages
    >>> messages(1 << 20, 64 << 20), messages(64, 64 << 20)
    (64, 4000)
"""

from __future__ import annotations

import gc
import socket
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial

from isolate.channel import Channel, Handshake
from isolate.channel.streams import SocketWire
from isolate.cli.bench import Figures, paired
from isolate.cli.bench.lines import attested_pair, opened
from isolate.errors import ChannelError

MIB = 1 << 20
ROUNDS = 15
SIZES = {"64b": 64, "4kib": 4096, "64kib": 65536, "1mib": MIB, "32mib": 32 * MIB}
KINDS = ["tcp", "plain_tcp", "tls_tcp", "tcp_gcm", "unix", "plain_unix", "shm", "plain_shm"]
THROUGHPUT = {
    "tcp_{}_vs_plain": ("tcp", "plain_tcp"),
    "tcp_{}_vs_tls13": ("tcp", "tls_tcp"),
}
AT_1_MIB = {
    "unix_1mib_vs_plain": ("unix", "plain_unix"),
    "shm_1mib_vs_memcpy_ring": ("shm", "plain_shm"),
    "aes_gcm_tcp_1mib_vs_tls13": ("tcp_gcm", "tls_tcp"),
}


def messages(size: int, volume: int) -> int:
    """How many messages make a measurable run: ``volume`` bytes, but at most 4,000 messages."""
    return max(1, min(volume // size, 4_000))


def peak_traced(sizes: list[int]) -> int:
    """The most bytes that Python allocates for sending and receiving one record, of all sizes, once warm."""
    first, second, expect = attested_pair()
    ends = socket.socketpair()
    cores = [
        Handshake(initiator=True, identity=first, expect=expect(1)),
        Handshake(initiator=False, identity=second, expect=expect(0)),
    ]
    made: list[Channel] = []

    def shake(end: socket.socket, core: Handshake) -> None:
        wire = SocketWire(end, 30.0)
        made.append(Channel(wire, wire.handshake(core)))

    thread = threading.Thread(target=shake, args=(ends[1], cores[1]))
    thread.start()
    shake(ends[0], cores[0])
    thread.join()
    one, other = made
    source, target = bytearray(max(sizes)), bytearray(max(sizes))
    most = 0
    got = threading.Semaphore(0)
    receiver = threading.Thread(target=_receive, args=(other, target, got))
    receiver.start()
    for size in sizes:
        view = memoryview(source)[:size]
        one.send(view)
        got.acquire()
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(3):
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                one.send(view)
                got.acquire()
                most = max(most, tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
    one.close()
    receiver.join()
    return most


def _receive(channel: Channel, target: bytearray, got: threading.Semaphore) -> None:
    try:
        while True:
            channel.recv_into(target)
            got.release()
    except ChannelError:
        channel.close()


def run(rounds: int | None, quick: bool) -> tuple[int, Figures]:
    """The figures of docs/benchmarks: throughputs as ratios (higher is better), times as ratios (lower is)."""
    turns = rounds or (3 if quick else ROUNDS)
    volume = (8 if quick else 64) * MIB
    sizes = {"64b": 64, "1mib": MIB} if quick else SIZES
    with opened(KINDS) as bench:
        measures: dict[str, Callable[[], float]] = {}
        ratios: dict[str, tuple[str, str]] = {}

        def throughput(kind: str, name: str, size: int) -> str:
            measure = f"{kind}_{name}"
            measures[measure] = partial(bench.throughput, kind, size, messages(size, volume))
            return measure

        for figure, (ours, theirs) in AT_1_MIB.items():
            ratios[figure] = (throughput(ours, "1mib", MIB), throughput(theirs, "1mib", MIB))
        for name, size in sizes.items():
            for figure, (ours, theirs) in THROUGHPUT.items():
                ratios[figure.format(name)] = (throughput(ours, name, size), throughput(theirs, name, size))
        trips, shakes = (50, 3) if quick else (400, 10)
        for kind in ("tcp", "plain_tcp", "tls_tcp"):
            measures[f"rtt_{kind}"] = partial(bench.round_trip, kind, 64, trips)
        for kind in ("tcp", "tls_tcp"):
            measures[f"handshake_{kind}"] = partial(bench.handshake, kind, shakes)
        ratios["rtt_64b_vs_plain"] = ("rtt_tcp", "rtt_plain_tcp")
        ratios["rtt_64b_vs_tls13"] = ("rtt_tcp", "rtt_tls_tcp")
        ratios["handshake_vs_mtls"] = ("handshake_tcp", "handshake_tls_tcp")
        # Once beforehand: buffers grow, and the kernel finds its window sizes.
        for measure in measures.values():
            measure()
        figures = paired(turns, measures, ratios)
        for kind in ("tcp", "plain_tcp", "tls_tcp"):
            bench.throughput(kind, MIB, messages(MIB, volume))
            figures[f"cpu_seconds_per_gb_{kind}"] = round(bench.cpu / (messages(MIB, volume) * MIB) * 1e9, 4)
    figures["peak_traced_bytes_per_record"] = peak_traced(list(sizes.values()))
    return turns, figures
