"""Both ends of every kind of connection that `isolate bench channels` compares, each by its best path.

    >>> from isolate.cli.bench.lines import attested_pair
    >>> one, other, expect = attested_pair()
    >>> expect(1).rank
    1

The second process is forked before anything is connected: a channel does not live on in a fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import secrets
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from isolate.attestation.appraisal import appraise
from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.attestation.policy import Policy, Reference
from isolate.attestation.result import issue
from isolate.channel import Attested, Expect, connect, listen, ring
from isolate.crypto import x509
from isolate.crypto.aead import Suite
from isolate.crypto.exchange import CurveKey
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.crypto.spiffe import Grant, LeafKey, RootKey, read_request, spiffe_id
from isolate.errors import UnavailableError
from isolate.launch.root import SimulatedRoot

LARGEST = 32 << 20  # bytes
_NAME = "bench.invalid"
# A kind may name its suite: tcp_gcm, tcp_aegis. Without, it is what a channel asks for by itself.
_SUITES = {"gcm": (Suite.AES_256_GCM,), "aegis": (Suite.AEGIS_256,)}


def attested_pair() -> tuple[Attested, Attested, Callable[[int], Expect]]:
    """Ranks 0 and 1 of a job, truly appraised on the simulated platform, and what to expect of a rank."""
    root, issuer = SimulatedRoot.generate(), SigningKey.generate()
    now = root.now()
    registers = {0: bytes([1]) * 48, 1: bytes([2]) * 48, 2: bytes([3]) * 48}
    policy = Policy(
        lineage="bench",
        sequence=1,
        references=(Reference(name="bench", kind="simulated", registers={"PCR0": registers[0]}),),
        simulated_anchors=(root.fingerprint,),
        INSECURE_accept_simulated=True,
    )

    def one(rank: int) -> Attested:
        static, sign = Secret.generate(32), SigningKey.generate()
        keys = KeyDigests.of({"channel": CurveKey(static).public, "sign": sign.verifying_key.to_bytes()})
        nonce, slot = secrets.token_bytes(32), Slot("bench", rank, 1)
        runtime = Runtime(kind="simulated", nonce=nonce, keys_digest=keys.digest, purpose="bench", slot=slot)
        evidence = root.module(f"bench-{rank}").document(registers, runtime.binding(), nonce)
        envelope = Envelope("simulated", evidence, (), runtime)
        appraisal = appraise(envelope, policy=policy, nonce=nonce, at=now, slot=slot)
        return Attested(issue(appraisal, key=issuer, issuer="bench", now=now, slot=slot), keys, static, sign)

    def expect(rank: int) -> Expect:
        return Expect(
            job="bench", rank=rank, issuer_key=issuer.verifying_key.ed25519, clock=lambda: now, lineage="bench",
            least_sequence=1, INSECURE_accept_simulated=True,
        )  # fmt: skip

    return one(0), one(1), expect


class Line(Protocol):
    """One end of one connection: whole messages of a size both ends know."""

    def send(self, data: memoryview) -> None: ...
    def take(self, buffer: memoryview) -> None: ...
    def close(self) -> None: ...


class Plain:
    """A bare socket: sendall, and recv_into with MSG_WAITALL, which is the fastest that Python has."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: memoryview) -> None:
        self._sock.sendall(data)

    def take(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._sock.recv_into(buffer[done:], 0, socket.MSG_WAITALL)
            if not count:
                raise UnavailableError("the other end of the benchmark is gone")
            done += count

    def close(self) -> None:
        self._sock.close()


class Tls(Plain):
    """stdlib ssl, TLS 1.3, mutual."""

    def take(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._sock.recv_into(buffer[done:])
            if not count:
                raise UnavailableError("the other end of the benchmark is gone")
            done += count


class MemcpyRing:
    """The ring of isolate.channel with nothing but copies: what shared memory gives without encryption."""

    def __init__(self, wire: ring.RingWire) -> None:
        self._wire = wire

    def send(self, data: memoryview) -> None:
        self._wire.send(data)

    def take(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._wire.read_some(buffer[done:])
            if not count:
                raise UnavailableError("the other end of the benchmark is gone")
            done += count

    def close(self) -> None:
        self._wire.drop(shared=False)


class Ours:
    """A channel."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self.send = channel.send
        self.close = channel.close

    def take(self, buffer: memoryview) -> None:
        self._channel.recv_into(buffer)


class Lines:
    """What both processes know beforehand: identities, certificates, and how each kind of line is opened."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second, self.expect = attested_pair()
        self._folder = folder
        # As mutual TLS is used: each end has a certificate of one authority, and trusts that authority alone.
        begin, end = int(time.time()) - 60, int(time.time()) + 86400
        root = RootKey(Secret.generate(32), "bench")
        own = root.certificate("bench", not_before=begin, not_after=end)
        (folder / "root.pem").write_bytes(x509.pem(own))
        for rank in (0, 1):
            key, uri = LeafKey.generate(), spiffe_id("bench", "bench", rank)
            grant = Grant(uri, _NAME, "bench", b"bench", begin, end)
            leaf = root.issue(own, read_request(key.request()), grant)
            (folder / f"rank{rank}.pem").write_bytes(key.to_pem() + x509.pem(leaf))

    def context(self, *, server: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self._folder / f"rank{int(server)}.pem")
        context.load_verify_locations(self._folder / "root.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def listen(self, kind: str) -> tuple[Any, str]:
        """The listening end of a kind (``tcp``, ``tcp_gcm``, ``unix``, ``tls_tcp``, ...) and its address."""
        suites = _SUITES.get(kind.rpartition("_")[2], ())
        if kind.startswith(("plain", "tls")):
            unix = not kind.endswith("tcp")
            sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM)
            sock.bind(str(self._folder / kind) if unix else ("127.0.0.1", 0))
            sock.listen(64)
            return sock, str(sock.getsockname() if unix else sock.getsockname()[1])
        address = "tcp:127.0.0.1:0" if kind.startswith("tcp") else f"{kind.split('_')[0]}:{self._folder / kind}"
        options: dict[str, Any] = {"suites": suites, "purpose": "bench"}
        listener = listen(address, identity=self.second, expect=self.expect(0), **options)
        return listener, listener.address

    def accept(self, kind: str, listener: Any, context: ssl.SSLContext) -> Line:
        if not kind.startswith(("plain", "tls")):
            return Ours(listener.accept())
        sock, _ = listener.accept()
        if kind == "plain_shm":
            return MemcpyRing(ring.offer(sock, None))
        return Tls(context.wrap_socket(sock, server_side=True)) if kind.startswith("tls") else Plain(sock)

    def connect(self, kind: str, address: str, context: ssl.SSLContext) -> Line:
        if not kind.startswith(("plain", "tls")):
            suites = _SUITES.get(kind.rpartition("_")[2], ())
            return Ours(
                connect(address, identity=self.first, expect=self.expect(1), suites=suites, purpose="bench")
            )
        if not kind.endswith("tcp"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(address)
        else:
            sock = socket.create_connection(("127.0.0.1", int(address)))
        if kind == "plain_shm":
            return MemcpyRing(ring.accept_offer(sock, None))
        if kind.startswith("tls"):
            return Tls(context.wrap_socket(sock, server_hostname=_NAME))
        return Plain(sock)


def two_cores() -> list[int]:
    """A core for each end, the same for whatever is compared: left alone, ends are moved together and apart.

    None where there is only one. Never two threads of one core, where the system tells.
    """
    cores = sorted(os.sched_getaffinity(0))
    try:
        shared = Path(f"/sys/devices/system/cpu/cpu{cores[0]}/topology/thread_siblings_list").read_text()
        siblings = {int(one) for part in shared.split(",") for one in part.split("-")}
    except (OSError, ValueError):
        siblings = set()
    apart = [core for core in cores[1:] if core not in siblings] or cores[1:]
    return [cores[0], apart[0]] if apart else []


def keep_to(cores: list[int]) -> None:
    """From now on run on these cores only; on any for an empty list."""
    if cores:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def kept_to(cores: list[int]) -> Iterator[None]:
    """The same for a while."""
    before = os.sched_getaffinity(0)
    try:
        keep_to(cores)
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _serve(lines: Lines, kinds: list[str], pipe: Connection) -> None:
    """The second process: does what the first says through the pipe, and answers with its CPU seconds."""
    context = lines.context(server=True)
    listeners = {kind: lines.listen(kind) for kind in kinds}
    pipe.send({kind: address for kind, (_, address) in listeners.items()})
    held = {kind: lines.accept(kind, listeners[kind][0], context) for kind in kinds}
    buffer = memoryview(bytearray(LARGEST))
    keep_to(two_cores()[1:])
    while True:
        try:
            order, kind, size, count = pipe.recv()
        except EOFError:
            return
        began, line = cpu_seconds(), held[kind]
        if order == "sink":
            for _ in range(count):
                line.take(buffer[:size])
        elif order == "echo":
            for _ in range(count):
                line.take(buffer[:size])
                line.send(buffer[:size])
        else:
            for _ in range(count):
                fresh = lines.accept(kind, listeners[kind][0], context)
                fresh.take(buffer[:1])
                fresh.send(buffer[:1])
                fresh.close()
        pipe.send(cpu_seconds() - began)


class Bench:
    """The first process's side: opens every line, and measures. Figures in seconds or bytes per second."""

    def __init__(self, lines: Lines, addresses: dict[str, str], pipe: Connection) -> None:
        self._lines, self._addresses, self._pipe = lines, addresses, pipe
        self._context = lines.context(server=False)
        self._held = {kind: lines.connect(kind, address, self._context) for kind, address in addresses.items()}
        self._buffer = memoryview(bytearray(secrets.token_bytes(LARGEST)))
        self.cpu = 0.0

    def throughput(self, kind: str, size: int, count: int) -> float:
        """Bytes per second from here to there; ``cpu`` is then what both sides used."""
        line, data = self._held[kind], self._buffer[:size]
        self._pipe.send(("sink", kind, size, count))
        began, used = time.perf_counter(), cpu_seconds()
        for _ in range(count):
            line.send(data)
        used = cpu_seconds() - used
        self.cpu = self._pipe.recv() + used
        return size * count / (time.perf_counter() - began)

    def round_trip(self, kind: str, size: int, count: int) -> float:
        """The 10th percentile of single round trips, in seconds."""
        line, data = self._held[kind], self._buffer[:size]
        back = memoryview(bytearray(size))
        self._pipe.send(("echo", kind, size, count))
        times = []
        for _ in range(count):
            began = time.perf_counter()
            line.send(data)
            line.take(back)
            times.append(time.perf_counter() - began)
        self._pipe.recv()
        return sorted(times)[len(times) // 10]

    def handshake(self, kind: str, count: int) -> float:
        """Seconds from connecting until a first byte came back; the 10th percentile.

        Until it came back: a TLS client is done before its own certificate was looked at.
        """
        self._pipe.send(("accept", kind, 0, count))
        times, back = [], memoryview(bytearray(1))
        for _ in range(count):
            began = time.perf_counter()
            line = self._lines.connect(kind, self._addresses[kind], self._context)
            line.send(self._buffer[:1])
            line.take(back)
            times.append(time.perf_counter() - began)
            line.close()
        self._pipe.recv()
        return sorted(times)[len(times) // 10]

    def close(self) -> None:
        for line in self._held.values():
            line.close()


@contextlib.contextmanager
def opened(kinds: list[str]) -> Iterator[Bench]:
    """A Bench with a line of each kind, and the process at their other ends."""
    with tempfile.TemporaryDirectory(prefix="isolate-bench-") as folder:
        lines = Lines(Path(folder))
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(lines, kinds, there), daemon=True
        )
        process.start()
        there.close()
        bench = Bench(lines, here.recv(), here)
        try:
            with kept_to(two_cores()[:1]):
                yield bench
        finally:
            bench.close()
            here.close()
            process.join(5)
            process.terminate()
