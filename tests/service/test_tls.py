"""TLS of the service: who a `tls:` address takes for the service, and what the network sees."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolate.cli import main
from isolate.crypto.tls import pin, self_signed
from isolate.errors import IsolateError, UsageError
from isolate.messages import http
from isolate.messages.attest import CertificateRequest, ServiceCertificate
from isolate.messages.http import Address, fetch, post
from isolate.service.app import Application
from isolate.service.listener import Listener, check_exposed
from isolate.service.tls import TlsIdentity, given_identity, kept_identity

NOW = int(time.time())


def certificate(address: str, **options: Any) -> ServiceCertificate:
    return post(address, "certificate", CertificateRequest(), ServiceCertificate, **options)


def identity(name: str = "localhost") -> TlsIdentity:
    return TlsIdentity.read(b"".join(self_signed(name, not_before=NOW - 60, not_after=NOW + 3600)))


class Impostor:
    """A TLS server with the certificate of somebody else. It keeps what it is told."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.got: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._context = context
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection:
                connection.settimeout(5)
                with self._context.wrap_socket(connection, server_side=True) as secured:
                    self.got.append(secured.recv(4096))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=10)


@pytest.fixture
def impostors() -> Iterator[Callable[[ssl.SSLContext], Impostor]]:
    made: list[Impostor] = []

    def start(context: ssl.SSLContext) -> Impostor:
        made.append(Impostor(context))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def listening(realm: Any) -> Iterator[Callable[..., str]]:
    """Runs a Listener in a thread, and gives the address that it says."""
    running: list[tuple[Listener, threading.Thread]] = []

    def start(address: str, made: TlsIdentity | None = None) -> str:
        said: list[str] = []
        ready = threading.Event()

        def tell(where: str) -> None:
            said.append(where)
            ready.set()

        server = Listener(Application(realm.service), Address.parse(address), identity=made, ready=tell)
        thread = threading.Thread(target=server.run)
        running.append((server, thread))
        thread.start()
        assert ready.wait(10)
        return said[0]

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=20)


def code(action: Callable[[], Any]) -> str:
    with pytest.raises(IsolateError) as refused:
        action()
    return refused.value.code


@pytest.mark.threat("SVC-30")
def test_a_pinned_service_and_an_impostor_that_learns_nothing(
    listening: Callable[..., str], impostors: Callable[[ssl.SSLContext], Impostor], realm: Any
) -> None:
    address = listening("tls:127.0.0.1:0", identity())
    assert certificate(address) == realm.state.certificate
    # Another key under the same name, at the address that the client was given.
    impostor = impostors(identity().context())
    wrong = f"tls:127.0.0.1:{impostor.port}#{address.partition('#')[2]}"
    assert code(lambda: certificate(wrong)) == "tls_refused"
    assert code(lambda: fetch(wrong, "/health", most=10)) == "tls_refused"
    impostor.close()
    assert b"".join(impostor.got) == b""


@pytest.mark.threat("SVC-30")
def test_without_a_pin_the_systems_authorities_and_the_name_decide(
    listening: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, realm: Any
) -> None:
    made = identity()
    port = listening("tls:127.0.0.1:0", made).partition("#")[0].rpartition(":")[2]
    assert code(lambda: certificate(f"tls:localhost:{port}")) == "tls_refused"
    # What the system trusts, OpenSSL reads from here.
    (tmp_path / "roots.pem").write_bytes(made.pem[made.pem.index(b"-----BEGIN CERT") :])
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "roots.pem"))
    http._context.cache_clear()
    try:
        assert certificate(f"tls:localhost:{port}") == realm.state.certificate
        assert code(lambda: certificate(f"tls:127.0.0.1:{port}")) == "tls_refused"
    finally:
        http._context.cache_clear()


@pytest.mark.threat("SVC-30")
def test_the_service_speaks_tls_1_3_and_nothing_older(listening: Callable[..., str]) -> None:
    address = Address.parse(listening("tls:127.0.0.1:0", identity()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    with socket.create_connection((address.host, address.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)
    # And plain HTTP is no way in.
    assert code(lambda: certificate(f"tcp:127.0.0.1:{address.port}")) == "service_unavailable"


@pytest.mark.threat("SVC-30")
def test_a_client_speaks_tls_1_3_and_nothing_older(impostors: Callable[[ssl.SSLContext], Impostor]) -> None:
    made = identity()
    context = made.context()
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    impostor = impostors(context)
    address = f"tls:127.0.0.1:{impostor.port}#{made.pin.hex()}"
    assert code(lambda: certificate(address)) == "service_unavailable"
    impostor.close()
    assert impostor.got == []


@pytest.mark.threat("SVC-30")
@pytest.mark.parametrize("address", ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:192.0.2.1:8440", "tcp:example:8440"])
def test_plain_tcp_is_for_this_machine_only(address: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_exposed(Address.parse(address))
    assert "tls:" in refused.value.hint


@pytest.mark.threat("SVC-30")
def test_serve_refuses_plain_tcp_that_others_reach(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("structlog.configure", lambda **_: None)  # it would be of all tests
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--state", "/nonexistent", "--listen", "tcp:0.0.0.0:8440"])
    assert (ended.value.code, "without TLS on this machine only" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    "address", ["tcp:127.0.0.1:1", "tcp:127.8.8.8:1", "tcp:[::1]:1", "tcp:localhost:1", "unix:/a"]
)
def test_what_stays_on_this_machine_needs_no_tls(address: str) -> None:
    check_exposed(Address.parse(address))


def test_a_listener_wants_an_identity_for_tls_alone(realm: Any) -> None:
    application = Application(realm.service)
    for address, made in (
        ("tls:127.0.0.1:0", None), ("tcp:127.0.0.1:0", identity()), ("tls:127.0.0.1:0#" + "0" * 64, identity()),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Listener(application, Address.parse(address), identity=made)


@pytest.mark.threat("SVC-30")
def test_a_courier_reaches_the_pinned_service_and_no_other(
    listening: Callable[..., str], impostors: Callable[[ssl.SSLContext], Impostor], tmp_path: Path, realm: Any
) -> None:
    """An enclave without a network asks the courier, which ends TLS: it hides nothing from that one."""
    address, impostor = listening("tls:127.0.0.1:0", identity()), impostors(identity().context())
    wrong = f"tls:127.0.0.1:{impostor.port}#{address.partition('#')[2]}"
    routes = [f"--route=good=unix:{tmp_path}/good>{address}", f"--route=wrong=unix:{tmp_path}/wrong>{wrong}"]
    command = [sys.executable, "-m", "isolate.launch.courier", *routes]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as courier:
        try:
            assert courier.stdout is not None
            assert courier.stdout.readline() == "ready\n"
            assert certificate(f"unix:{tmp_path}/good") == realm.state.certificate
            assert code(lambda: certificate(f"unix:{tmp_path}/wrong")) == "service_unavailable"
        finally:
            courier.kill()
            _, said = courier.communicate()
    impostor.close()
    assert (said, b"".join(impostor.got)) == ("wrong: tls_refused\n", b"")


# The key of the listener


@pytest.mark.threat("SVC-31")
def test_the_key_is_made_once_and_lies_sealed(realm: Any) -> None:
    made = kept_identity(realm.state, host="::1", now=NOW)
    assert kept_identity(realm.state, host="elsewhere", now=NOW + 10**8) == made
    realm.reopen()
    assert kept_identity(realm.state, host="elsewhere", now=NOW + 10**8) == made
    assert "PRIVATE" not in repr(made)
    assert made.self_signed
    lines = made.pem.splitlines()
    for path in (realm.folder / "state").iterdir():
        content = path.read_bytes()
        assert not any(line in content for line in lines[1:3]), path.name
    with realm.state.transaction() as database:
        database.execute("UPDATE meta SET value = x'00' WHERE key = 'box/tls'")
    assert code(lambda: kept_identity(realm.state, host="::1", now=NOW)) == "storage"


def test_given_files_that_do_not_go_together(tmp_path: Path) -> None:
    key, own = self_signed("localhost", not_before=0, not_after=NOW + 3600)
    other, _ = self_signed("localhost", not_before=0, not_after=NOW + 3600)
    for name, content in (("key", key), ("own", own), ("other", other), ("rubbish", b"rubbish")):
        (tmp_path / name).write_bytes(content)
    assert given_identity(tmp_path / "own", tmp_path / "key").pin == pin(own)[0]
    given_identity(tmp_path / "own", tmp_path / "key").context()
    assert code(given_identity(tmp_path / "own", tmp_path / "other").context) == "usage"
    assert code(given_identity(tmp_path / "own", tmp_path / "rubbish").context) == "usage"
    assert code(lambda: given_identity(tmp_path / "rubbish", tmp_path / "key")) == "usage"
    assert code(lambda: given_identity(tmp_path / "none", tmp_path / "key")) == "usage"


def test_a_key_with_a_passphrase_asks_nobody(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("makes the key with the openssl command, which is not installed")
    key, own = self_signed("localhost", not_before=0, not_after=NOW + 3600)
    (tmp_path / "own").write_bytes(own)
    locked = subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret"], input=key, capture_output=True, check=True
    )
    (tmp_path / "key").write_bytes(locked.stdout)
    assert code(given_identity(tmp_path / "own", tmp_path / "key").context) == "usage"


# As a process


def test_it_serves_what_it_says_and_keeps_its_pin(serving: Callable[..., Any]) -> None:
    first = serving("tls:127.0.0.1:0")
    one = certificate(first.address)
    assert first.end() == 0
    again = serving("tls:localhost:0")
    assert again.address.partition("#")[2] == first.address.partition("#")[2] != ""
    assert certificate(again.address) == one
    assert '"tls": "TLSv1.3"' in again.errors.read_text()


def test_a_given_certificate(serving: Callable[..., Any], tmp_path: Path) -> None:
    key, own = self_signed("localhost", not_before=NOW - 60, not_after=NOW + 3600)
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "own").write_bytes(own)
    one = serving("tls:127.0.0.1:0", "--tls-cert", f"{tmp_path}/own", "--tls-key", f"{tmp_path}/key")
    assert one.address.endswith(f"#{pin(own)[0].hex()}")
    certificate(one.address)


_READ = """
import sys
for name in ("mem", "environ", "maps"):
    try:
        open(f"/proc/{sys.argv[1]}/{name}", "rb").read(0)
    except PermissionError:
        continue
    print(name)
"""


def _without_privileges() -> None:
    """In a child before its exec: root keeps none of its capabilities, so that it is like any other user."""
    libc = ctypes.CDLL(None)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.threat("SVC-32")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_another_process_of_its_user_reads_neither_memory_nor_core(serving: Callable[..., Any]) -> None:
    """And it serves TLS all the same: the key goes through a file in memory, which that user can still open."""
    one = serving("tls:127.0.0.1:0", preexec_fn=_without_privileges)
    certificate(one.address)
    status = Path(f"/proc/{one.process.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    limits = Path(f"/proc/{one.process.pid}/limits").read_text()
    assert next(line.split()[4:6] for line in limits.splitlines() if "core" in line) == ["0", "0"]
    # The same attack on a process that is not hardened, so that this one can fail.
    with subprocess.Popen(["sleep", "60"], preexec_fn=_without_privileges) as plain:
        read = {
            number: subprocess.run(
                [sys.executable, "-I", "-c", _READ, str(number)],
                capture_output=True, text=True, check=True, timeout=60, preexec_fn=_without_privileges,
            ).stdout.split()
            for number in (plain.pid, one.process.pid)
        }  # fmt: skip
        plain.kill()
    assert read == {plain.pid: ["mem", "environ", "maps"], one.process.pid: []}
    assert one.end() == 0


@pytest.mark.threat("SVC-32")
def test_a_process_that_cannot_be_protected_does_not_serve(tmp_path: Path) -> None:
    program = (
        "import sys; from isolate.enclave import boot; boot.harden = lambda: None; from isolate.cli import main; "
        f"sys.argv[1:] = ['serve', '--state', '{tmp_path}/none']; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "not protected: non_dumpable" in done.stderr
