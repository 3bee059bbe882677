"""Certificates as a TLS engine uses them: files, rotation while serving, and peers that are refused."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isolate.crypto.tls import self_signed
from isolate.enclave import certificates
from isolate.errors import CertificateRefused, ServiceUnavailable, StorageError


def context(folder: Path, side: Any) -> ssl.SSLContext:
    """As any program sets up mutual TLS from files."""
    found = ssl.SSLContext(side)
    found.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    found.load_verify_locations(folder / "roots.pem")
    found.verify_mode = ssl.CERT_REQUIRED
    return found


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> bytes:
    """The certificate that the server was shown. Raises ssl.SSLError or OSError, whichever end refuses."""
    near, far = socket.socketpair()
    shown: list[bytes] = []
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            with server.wrap_socket(far, server_side=True) as stream:
                shown.append(stream.getpeercert(True) or b"")
                stream.sendall(b"served")
        except OSError as error:
            failed.append(error)
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with near, client.wrap_socket(near, server_hostname=name) as stream:
            if stream.recv(6) != b"served":
                raise ssl.SSLError("the server ended it")
    finally:
        thread.join(10)
    if failed:
        raise failed[0]
    return shown[0]


@pytest.fixture
def wall(realms: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A realm whose clock stands at the machine's time: OpenSSL looks at no other."""
    monkeypatch.setitem(realms.__globals__, "NOW", int(time.time()))
    return realms()


@pytest.fixture
def written(wall: Any, tmp_path: Path) -> Callable[..., tuple[Any, certificates.Credentials, Path]]:
    def make(rank: int = 0, measurement: str = "reader", **options: Any) -> Any:
        workload = wall.enclave(measurement, rank=rank, **options)
        credentials = certificates.obtain(workload)
        folder = tmp_path / f"{workload.slot.job.replace('/', '-')}-{rank}"
        return workload, credentials, certificates.write(credentials, folder)

    return make


@pytest.mark.threat("SVC-58")
def test_plain_tls_takes_the_jobs_workloads_and_no_others(written: Any, tmp_path: Path) -> None:
    _, server, served = written(0)
    workload, _, one = written(1)
    listener, client = context(served, ssl.PROTOCOL_TLS_SERVER), context(one, ssl.PROTOCOL_TLS_CLIENT)
    shown = handshake(listener, client, server.name)
    seen = certificates.verify_peer(workload, server, shown, rank=1)
    assert seen.instance == workload.result.instance
    # Another rank answers, and the client named this one.
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        handshake(context(one, ssl.PROTOCOL_TLS_SERVER), client, server.name)
    # A workload of another job, by the same service, in the same trust domain.
    _, other, elsewhere = written(0, "other", job="acme/else")
    with pytest.raises(OSError):
        handshake(listener, context(elsewhere, ssl.PROTOCOL_TLS_CLIENT), server.name)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        handshake(context(elsewhere, ssl.PROTOCOL_TLS_SERVER), client, other.name)
    # Nobody: no certificate, and one that its holder signed.
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(one / "roots.pem")
    with pytest.raises(OSError):
        handshake(listener, bare, server.name)
    key, own = self_signed(str(server.name), not_before=0, not_after=4_000_000_000)
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "certificate.pem").write_bytes(own)
    (tmp_path / "roots.pem").write_bytes(server.roots)
    with pytest.raises(OSError):
        handshake(listener, context(tmp_path, ssl.PROTOCOL_TLS_CLIENT), server.name)


@pytest.mark.threat("SVC-58")
def test_a_server_that_asks_learns_the_rank(written: Any) -> None:
    _, server, served = written(0)
    _, _, two = written(2)
    workload, _, _ = written(1)
    shown = handshake(context(served, ssl.PROTOCOL_TLS_SERVER), context(two, ssl.PROTOCOL_TLS_CLIENT), server.name)
    assert certificates.verify_peer(workload, server, shown).rank == 2
    with pytest.raises(CertificateRefused):
        certificates.verify_peer(workload, server, shown, rank=1)


@pytest.mark.threat("SVC-59")
def test_files_are_replaced_as_a_set_and_for_their_owner_only(realm: Any, tmp_path: Path) -> None:
    workload, folder = realm.enclave(), tmp_path / "tls"
    sets = [certificates.write(certificates.obtain(workload), folder) for _ in range(3)]
    assert (folder / "current").resolve() == sets[2].resolve()
    assert not sets[0].exists()
    assert sets[1].exists()  # for who was reading it
    assert sorted(path.name for path in folder.iterdir()) == sorted(["current", sets[1].name, sets[2].name])
    for path in sets[2].iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in (folder, *sets[1:]):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    both = (sets[2] / "identity.pem").read_bytes()
    assert both == (sets[2] / "key.pem").read_bytes() + (sets[2] / "certificate.pem").read_bytes()
    assert (sets[1] / "key.pem").read_bytes() != (sets[2] / "key.pem").read_bytes()


@pytest.mark.threat("SVC-59")
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "symlink", "rename"])
def test_a_failed_write_leaves_the_set_before(
    realm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    workload, folder = realm.enclave(), tmp_path / "tls"
    before = certificates.write(certificates.obtain(workload), folder)
    credentials = certificates.obtain(workload)

    real = getattr(os, call)

    def full(*arguments: Any, **options: Any) -> Any:
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, call, full)
        with pytest.raises(StorageError):
            certificates.write(credentials, folder)
    assert (folder / "current").resolve() == before.resolve()
    assert sorted(path.name for path in folder.iterdir()) == sorted(["current", before.name])


@pytest.mark.threat("SVC-60")
def test_certificates_are_renewed_before_they_end(realm: Any, tmp_path: Path) -> None:
    workload = realm.enclave()
    with certificates.keep(workload, tmp_path / "tls", lifetime=2) as keeper:
        first = keeper.current
        realm.clock.now += 1
        assert keeper.wait(1, timeout=20)
        second = keeper.current
        assert second.expires > first.expires
        assert second.key != first.key
        on_disk = (tmp_path / "tls" / "current" / "certificate.pem").read_bytes()
    assert on_disk in (second.certificate, keeper.current.certificate)


@pytest.mark.threat("SVC-60")
def test_while_the_service_is_down_the_old_one_stays_and_it_is_tried_again(
    realm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "RETRY", 0.01)
    workload = realm.enclave()
    reported: list[str] = []
    monkeypatch.setattr(workload, "report", lambda _, code: reported.append(code))
    serve, down = realm.courier, threading.Event()

    def courier(route: str, body: bytes) -> tuple[int, bytes]:
        if down.is_set():
            raise ServiceUnavailable("no answer")
        answer: tuple[int, bytes] = serve(route, body)
        return answer

    realm.courier = courier
    with certificates.keep(workload, tmp_path / "tls", lifetime=2) as keeper:
        down.set()
        kept = keeper.current
        for _ in range(500):
            if len(reported) > 1:
                break
            time.sleep(0.02)
        assert set(reported) == {"service_unavailable"}
        assert keeper.current is kept
        down.clear()
        assert keeper.wait(1, timeout=20)
    assert keeper.number >= 2
