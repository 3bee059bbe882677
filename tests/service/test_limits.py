"""What one peer gets of the service, and that it ends in bounded time: buckets, seats, floods, drips, SIGTERM."""

from __future__ import annotations

import contextlib
import errno
import http.client
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolate.client.owner import Owner
from isolate.crypto.tls import self_signed
from isolate.errors import ServiceUnavailable, UnavailableError
from isolate.messages.attest import CertificateRequest, ServiceCertificate
from isolate.messages.base import MAX_MESSAGE, Refusal
from isolate.messages.http import Address, fetch, post
from isolate.messages.owner import LogRequest
from isolate.service import app, limits, listener
from isolate.service.app import Application
from isolate.service.limits import Limits, Rate, Seats, peer_of_address
from isolate.service.listener import Listener
from isolate.service.tls import TlsIdentity

CERTIFICATE = CertificateRequest().encode()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# Buckets and seats


def test_a_bucket_fills_with_time() -> None:
    clock = Clock()
    rate = Rate(10, 3, clock=clock)
    assert [rate.take("a") for _ in range(4)] == pytest.approx([0, 0, 0, 0.1])
    clock.now += 0.05
    assert rate.take("a") == pytest.approx(0.05)
    # Who is refused pays nothing for it.
    clock.now += 0.0501
    assert (rate.take("a"), rate.take("b")) == (0, 0)
    clock.now += 1000
    assert [rate.take("a") > 0 for _ in range(4)] == [False, False, False, True]
    # A clock that goes back gives nothing.
    clock.now -= 500
    assert rate.take("a") > 0
    assert all(Rate(0, 1, clock=clock).take("a") == 0 for _ in range(100))


@pytest.mark.threat("SVC-34")
def test_filling_the_table_of_peers_empties_nobodys_bucket() -> None:
    clock = Clock()
    rate = Rate(1, 2, clock=clock, most=100)
    assert [rate.take("flood") > 0 for _ in range(3)] == [False, False, True]
    taken = sum(rate.take(f"peer {number}") == 0 for number in range(1000))
    assert (taken, len(rate)) == (99 + 2, 101)
    assert rate.take("flood") > 0
    # Whoever is full again says nothing, and makes room.
    clock.now += 10
    assert rate.take("newcomer") == 0
    assert len(rate) <= 101


@pytest.mark.parametrize("address", ["", "a.example", "1.2.3", "fe80::1%eth0", "\x00"])
def test_odd_addresses_have_a_peer(address: str) -> None:
    assert peer_of_address(address) in ("unknown", "fe80::/64")


def test_seats() -> None:
    seats = Seats(3, 2)
    assert [seats.take("a") for _ in range(3)] == [True, True, False]
    assert [seats.take("b") for _ in range(2)] == [True, False]
    seats.leave("a")
    assert (seats.take("c"), seats.taken) == (True, 3)


# A listener


class Running:
    """A Listener in a thread of this process."""

    def __init__(self, service: Any, address: str, *, rate: float = 0) -> None:
        self.clock = Clock()
        self.application = Application(service, Limits(rate=rate, clock=self.clock))
        said: list[str] = []
        ready = threading.Event()

        def tell(where: str) -> None:
            said.append(where)
            ready.set()

        where, identity = Address.parse(address), None
        if where.kind == "tls":
            identity = TlsIdentity.read(b"".join(self_signed(where.host, not_before=0, not_after=2**31)))
        self.server = Listener(self.application, where, identity=identity, ready=tell)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        assert ready.wait(10)
        self.address = said[0]
        self._where = Address.parse(self.address)

    def connect(self) -> socket.socket:
        if self._where.kind != "unix":
            made = socket.create_connection((self._where.host, self._where.port), timeout=10)
            if self._where.kind == "tcp":
                return made
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return context.wrap_socket(made)
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(10)
        made.connect(self._where.host)
        return made

    def ask(self, method: str = "POST", path: str = "/v1/certificate", body: bytes = CERTIFICATE) -> Any:
        """Status, headers, and the body or the code of the refusal."""
        with contextlib.closing(self.connect()) as made:
            return exchange(made, method, path, body)

    def count(self, limit: str) -> float:
        text = self.application.metrics.text()
        return float(text.partition(f'isolate_limited_total{{limit="{limit}"}} ')[2].splitlines()[0])

    def end(self) -> None:
        self.server.should_exit = True
        self._thread.join(timeout=30)


def exchange(made: socket.socket, method: str, path: str, body: bytes) -> Any:
    connection = http.client.HTTPConnection("isolate")
    connection.sock = made
    connection.request(method, path, body)
    response = connection.getresponse()
    answer = response.read()
    code = Refusal.parse(answer).code if response.status != 200 else answer
    return response.status, response.headers, code


@pytest.fixture
def running(realm: Any, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(address: str = f"unix:{tmp_path}/socket", **options: Any) -> Running:
        made.append(Running(realm.service, address, **options))
        return made[-1]

    yield start
    for one in made:
        one.end()


@pytest.mark.threat("SVC-34")
def test_one_peer_floods_and_another_is_served(running: Callable[..., Running], capfd: Any) -> None:
    service = running("tcp:127.0.0.1:0", rate=2)
    answers = [service.ask() for _ in range(8)]
    assert [status for status, _, _ in answers] == [200] * 4 + [429] * 4
    status, headers, code = answers[-1]
    assert (status, code, headers["Retry-After"]) == (429, "too_many", "1")
    assert service.count("rate") == 4
    # What is asked before all else stays, and says nothing; figures and files are limited like the rest.
    assert service.ask("GET", "/health")[0] == 200
    for path in ("/metrics", "/openapi.json", "/log/checkpoint", "/nowhere"):
        assert service.ask("GET", path)[0] == 429
    # Its name for itself does not count.
    with contextlib.closing(service.connect()) as made:
        made.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 10.1.2.3\r\n\r\n")
        assert made.recv(12) == b"HTTP/1.1 429"
    # Another address of this machine is another peer.
    with contextlib.closing(socket.socket()) as other:
        other.settimeout(10)
        other.bind(("127.0.0.2", 0))
        other.connect(("127.0.0.1", Address.parse(service.address).port))
        assert exchange(other, "POST", "/v1/certificate", CERTIFICATE)[0] == 200
    # A flood of requests is none of lines.
    said = capfd.readouterr()
    assert (said.out + said.err).count("request.limited") == 4  # the 1st, 2nd, 4th and 8th of 9


@pytest.mark.threat("SVC-34")
def test_a_user_of_the_unix_socket_is_a_peer(running: Callable[..., Running]) -> None:
    service = running(rate=1)
    assert [service.ask()[0] for _ in range(4)] == [200, 200, 429, 429]
    service.clock.now += 1.05
    assert service.ask()[0] == 200
    # The client waits, and asks again; here it takes too long.
    with pytest.raises(ServiceUnavailable) as refused:
        post(service.address, "certificate", CertificateRequest(), ServiceCertificate)
    assert refused.value.code == "too_many", str(refused.value)


@pytest.mark.threat("SVC-35")
def test_a_slow_disk_piles_up_no_requests(
    running: Callable[..., Running], realm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_BEGUN", 3)
    monkeypatch.setattr(app, "SCRAPE_TIMEOUT", 0.1)
    service, answers = running(), []

    def ask() -> None:
        answers.append(service.ask("POST", "/v1/log", LogRequest(0, None).encode())[0])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    with realm.state.transaction():  # whatever needs the state waits for this one, as for a commit
        for thread in threads:
            thread.start()
        ended = time.monotonic() + 10
        while service.application.limits.begun.taken < 3 and time.monotonic() < ended:
            time.sleep(0.01)
        status, headers, code = service.ask()
        assert (status, code, headers["Retry-After"]) == (503, "busy", "1")
        assert service.ask("GET", "/log/checkpoint")[::2] == (503, "busy")
        # Who looks after it is answered all the same.
        assert service.ask("GET", "/health")[0] == 200
        began = time.monotonic()
        assert b"isolate_requests_begun 3.0" in service.ask("GET", "/metrics")[2]
        assert time.monotonic() - began < 5
    for thread in threads:
        thread.join(timeout=20)
    assert answers == [200] * 3
    assert service.ask()[0] == 200
    assert (service.count("busy"), service.application.limits.begun.taken) == (2, 0)


@pytest.mark.threat("SVC-35")
def test_connections_that_say_nothing_keep_nobody_out(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 6)
    monkeypatch.setattr(limits, "MAX_OF_PEER", 4)
    monkeypatch.setattr(limits, "MAX_UNSEATED", 2)
    service = running("tcp:127.0.0.1:0")
    places = service.application.limits
    with contextlib.ExitStack() as undo:
        for _ in range(4):
            undo.enter_context(contextlib.closing(service.connect()))
        status, headers, code = service.ask()
        assert (status, code, headers["Retry-After"], headers["Connection"]) == (503, "busy", "1", "close")
        # Another peer finds a place.
        other = undo.enter_context(contextlib.closing(socket.socket()))
        other.settimeout(10)
        other.bind(("127.0.0.2", 0))
        other.connect(("127.0.0.1", Address.parse(service.address).port))
        assert exchange(other, "POST", "/v1/certificate", CERTIFICATE)[0] == 200
        # Beyond the places there is little room, and then none.
        more = [undo.enter_context(contextlib.closing(service.connect())) for _ in range(3)]
        assert gone(more[2])
    ended = time.monotonic() + 20
    while places.connections.taken + places.unseated.taken and time.monotonic() < ended:
        time.sleep(0.01)
    monkeypatch.setattr(listener, "CONNECTION_TIMEOUT", 0.5)
    with contextlib.ExitStack() as undo:
        silent = [undo.enter_context(contextlib.closing(service.connect())) for _ in range(6)]
        gone(silent[0], b"POST /v1/certificate HTTP/1.1\r\nHost: x\r\nX-Drip:")
        # Bytes that keep coming change nothing: what is not a whole request in time ends.
        ended = time.monotonic() + 5
        while not gone(silent[0], b"x") and time.monotonic() < ended:
            time.sleep(0.05)
        assert time.monotonic() < ended
        assert all(gone(one) for one in silent[1:])
        assert service.ask()[0] == 200
    assert places.connections.taken <= 1
    assert places.unseated.taken == 0


def gone(made: socket.socket, byte: bytes = b"") -> bool:
    """Whether the other side ended this connection; waits for that unless there is something to send."""
    try:
        if byte:
            made.sendall(byte)
            return False
        return made.recv(1) == b""
    except OSError as error:
        return error.errno in (errno.ECONNRESET, errno.EPIPE)


@pytest.mark.threat("SVC-35")
def test_who_reads_no_answer_is_hung_up_on(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "CONNECTION_TIMEOUT", 0.5)
    service = running()
    with contextlib.closing(service.connect()) as made:
        made.setblocking(False)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50
        ended = time.monotonic() + 10
        while time.monotonic() < ended:
            try:
                made.send(request)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError as error:
                assert error.errno in (errno.ECONNRESET, errno.EPIPE)
                break
        assert time.monotonic() < ended


def test_sizes_and_times_are_counted(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    service = running()
    assert service.ask(body=bytes(MAX_MESSAGE + 1))[::2] == (413, "too_large")
    monkeypatch.setattr(app, "BODY_TIMEOUT", 0.2)
    with contextlib.closing(service.connect()) as made:
        made.sendall(b"POST /v1/log HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
        assert made.recv(12) == b"HTTP/1.1 408"
    assert (service.count("size"), service.count("time")) == (1, 1)


def test_what_is_nowhere_is_refused_by_a_message(running: Callable[..., Running]) -> None:
    service = running()
    assert service.ask("GET", "/nowhere")[::2] == (404, "unknown_route")
    assert service.ask("POST", "/v1/nowhere")[::2] == (404, "unknown_route")
    status, headers, code = service.ask("GET", "/v1/challenge")
    assert (status, code, headers["Allow"]) == (405, "unknown_method", "POST")
    assert service.ask("DELETE", "/metrics")[::2] == (405, "unknown_method")
    # Not sent on to a host that the request names.
    for path in ("/v1", "/health/", "/log"):
        assert service.ask("GET", path)[::2] == (404, "unknown_route")


def test_an_address_that_is_taken(realm: Any, running: Callable[..., Running], tmp_path: Path) -> None:
    taken = running("tcp:127.0.0.1:0").address
    for address in (taken, f"unix:{tmp_path}/none/socket"):
        with pytest.raises(UnavailableError):
            listener.serve(Application(realm.service), Address.parse(address), ready=lambda _: None)


# The end


HEAD = b"POST /v1/certificate HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"


def begin(made: socket.socket, size: int) -> None:
    """Send the head of a request with this many bytes, and wait until the service asks for them: it has begun."""
    made.sendall(HEAD % size)
    got = b""
    while not got.endswith(b"\r\n\r\n"):
        got += made.recv(1)
    assert got.startswith(b"HTTP/1.1 100")


@pytest.mark.threat("SVC-36")
@pytest.mark.parametrize("drips", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigterm_answers_what_was_begun_and_waits_for_nobody(serving: Callable[..., Any], drips: bool) -> None:
    """With an idle connection, one with half a head, one in the midst of a request, and one that drips."""
    one = serving("tcp:127.0.0.1:0")
    where = Address.parse(one.address)
    Owner(one.owner, service=one.address, lineage="acme").set_rule("a/b")
    size = fetch(one.address, "/log/checkpoint", most=4096).splitlines()[1]

    with contextlib.ExitStack() as undo:

        def connect() -> socket.socket:
            made = socket.create_connection((where.host, where.port), timeout=20)
            return undo.enter_context(contextlib.closing(made))

        idle, half, slow, dripping = connect(), connect(), connect(), connect()
        assert exchange(idle, "GET", "/health", b"")[0] == 200
        half.sendall(HEAD[:40])
        begin(slow, len(CERTIFICATE))
        slow.sendall(CERTIFICATE[:-1])
        if drips:
            begin(dripping, 1000)
        began = time.monotonic()
        one.process.send_signal(signal.SIGTERM)
        # Nobody new; what was idle or not yet a request is over; what was begun is answered.
        assert idle.recv(1) == half.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            connect()
        slow.sendall(CERTIFICATE[-1:])
        assert slow.recv(12) == b"HTTP/1.1 200"
        with contextlib.suppress(OSError):
            while drips and one.process.poll() is None and time.monotonic() - began < 25:
                dripping.sendall(b"x")
                time.sleep(0.2)
        # Told again and again until it is gone: what has closed everything ends as what has.
        while one.process.poll() is None and time.monotonic() - began < 25:
            one.process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        assert one.end() == 0
        assert time.monotonic() - began < (listener.GRACE + 5 if drips else 5)
    assert "Traceback" not in one.errors.read_text()
    assert (one.folder / "head").read_bytes().splitlines()[1] == size != b"0"


@pytest.mark.threat("SVC-36")
@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_a_dripping_client_holds_the_end_up_for_a_bounded_time(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(listener, "GRACE", 0.3)
    monkeypatch.setattr(listener, "HANGUP", 0.3)
    service = running(f"{kind}:127.0.0.1:0")
    with contextlib.closing(service.connect()) as made, contextlib.closing(service.connect()) as idle:
        exchange(idle, "GET", "/health", b"")
        begin(made, 1000)
        began = time.monotonic()
        service.end()
        assert time.monotonic() - began < 4


@pytest.mark.threat("SVC-36")
def test_an_idle_client_that_says_no_goodbye_is_not_waited_for(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS waits for the other side's goodbye, asyncio for 30 s."""
    monkeypatch.setattr(listener, "HANGUP", 0.2)
    service = running("tls:127.0.0.1:0")
    with contextlib.closing(service.connect()) as idle:
        exchange(idle, "GET", "/health", b"")
        began = time.monotonic()
        service.end()
        assert time.monotonic() - began < listener.GRACE / 2
