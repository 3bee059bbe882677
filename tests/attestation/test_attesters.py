"""The attesters against fakes that speak the kernel's interface. None of them has seen real hardware."""

from __future__ import annotations

import ctypes
import socket
import struct
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pytest

from isolate.attestation.attesters.nitro import NSM_IOCTL_RAW, NitroAttester
from isolate.attestation.attesters.simulated import MAX_FRAME, SimulatedAttester, read_frame, write_frame
from isolate.attestation.attesters.tsm import TsmAttester, certificates
from isolate.attestation.evidence import Runtime
from isolate.attestation.verifiers import nitro as nitro_verifier
from isolate.crypto import cbor
from isolate.errors import ControlMissing, IsolateError, MalformedError, UnavailableError, UsageError

NOW = 1_780_000_000


def runtime(kind: str) -> Runtime:
    return Runtime(kind=kind, nonce=b"n" * 32, keys_digest=b"k" * 32, purpose="train")


# --- /dev/nsm ---


def nsm(answer: Callable[[Any], Any]) -> Callable[[int, int, bytearray], int]:
    """The device: read the request where struct nsm_raw points, write the answer there, set its length."""

    def ioctl(descriptor: int, operation: int, argument: bytearray) -> int:
        # linux/nsm.h: NSM_MAGIC 0x0A, number 0, _IOWR of four 64-bit words.
        assert operation == NSM_IOCTL_RAW == 0xC0200A00
        address, length, into, space = struct.unpack("=QQQQ", argument)
        assert length <= 0x1000 and space == 0x3000
        body = answer(cbor2.loads(ctypes.string_at(address, length)))
        data = body if isinstance(body, bytes) else cbor2.dumps(body)
        ctypes.memmove(into, data, min(len(data), space))
        struct.pack_into("=QQQQ", argument, 0, address, length, into, len(data))
        return 0

    return ioctl


def test_a_nitro_document_binds_the_runtime_map(nitro_root: Any) -> None:
    def device(request: Any) -> Any:
        asked = request["Attestation"]
        assert set(asked) == {"user_data", "nonce", "public_key"} and asked["public_key"] is None
        fields = nitro_root.fields(user_data=asked["user_data"], nonce=asked["nonce"])
        return {"Attestation": {"document": nitro_root.document(cbor.encode(fields))}}

    document = NitroAttester("/dev/null", ioctl=nsm(device)).attest(runtime("nitro"))
    claims = nitro_verifier.verify(document, at=NOW, anchors=[nitro_root.fingerprint])
    assert claims.binding == runtime("nitro").binding() and claims.nonce == b"n" * 32


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([], MalformedError), ({"Error": "InvalidArgument"}, UnavailableError),
        ({"Attestation": {}}, MalformedError),
        ({"Attestation": {"document": "text"}}, MalformedError), ({}, MalformedError), (b"\xff", MalformedError),
        (b"", MalformedError), (bytes(0x3001), MalformedError),
    ],
)  # fmt: skip
def test_odd_answers_of_the_module(answer: Any, error: type[IsolateError]) -> None:
    with pytest.raises(error):
        NitroAttester("/dev/null", ioctl=nsm(lambda request: answer)).attest(runtime("nitro"))


def test_no_module_and_a_failing_one(tmp_path: Path) -> None:
    with pytest.raises(ControlMissing):
        NitroAttester(str(tmp_path / "none")).attest(runtime("nitro"))
    # The real ioctl, on a device that does not know it.
    with pytest.raises(UnavailableError):
        NitroAttester("/dev/null").attest(runtime("nitro"))


# --- configfs ---


class Configfs:
    """The kernel's side: a directory per entry, a generation that counts writes, a report over the last inblob."""

    def __init__(self, provider: str, table: bytes = b"", other_writers: int = 0) -> None:
        self.provider, self.table, self.other_writers = provider, table, other_writers
        self.entries: dict[Path, dict[str, Any]] = {}

    def make(self, path: Path) -> None:
        self.entries[path] = {"generation": 0, "inblob": b""}

    def remove(self, path: Path) -> None:
        del self.entries[path]

    def write(self, path: Path, data: bytes) -> None:
        entry = self.entries[path.parent]
        if path.name != "inblob" or len(data) > 64:
            raise OSError(22, "Invalid argument")
        entry["inblob"], entry["generation"] = data, entry["generation"] + 1

    def read(self, path: Path, limit: int) -> bytes:
        entry = self.entries[path.parent]
        if path.name == "outblob" and self.other_writers:
            self.other_writers -= 1
            self.write(path.parent / "inblob", b"theirs")
        values = {
            "provider": self.provider.encode() + b"\n",
            "generation": str(entry["generation"]).encode() + b"\n",
            "outblob": b"report of " + entry["inblob"],
            "auxblob": self.table,
        }
        return bytes(values[path.name])[:limit]


def table(*rows: tuple[str, bytes]) -> bytes:
    """The GHCB certificate table."""
    head, body, offset = b"", b"", 24 * (len(rows) + 1)
    for name, data in rows:
        head += uuid.UUID(name).bytes_le + struct.pack("<II", offset + len(body), len(data))
        body += data
    return head + bytes(24) + body


VCEK, ASK, ARK = (
    "63da758d-e664-4564-adc5-f4b93be8accd",
    "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "c0b406a4-a803-4952-9743-3fb6014cd0ae",
)


def test_a_report_with_the_certificates_that_the_host_left() -> None:
    kernel = Configfs("sev_guest", table((VCEK, b"vcek"), (ASK, b"ask"), (ARK, b"ark")))
    attester = TsmAttester("/root", files=kernel)
    wanted = runtime("sev-snp")
    assert attester.attest(wanted) == b"report of " + wanted.binding()
    assert attester.collateral == (b"vcek", b"ask")
    assert kernel.entries == {}


def test_a_quote() -> None:
    wanted = runtime("tdx")
    assert TsmAttester("/root", files=Configfs("tdx_guest")).attest(wanted) == b"report of " + wanted.binding()


def test_another_kind_of_machine() -> None:
    for provider, kind in (("tdx_guest", "sev-snp"), ("arm_cca_guest", "sev-snp"), ("", "tdx")):
        kernel = Configfs(provider)
        with pytest.raises(UsageError):
            TsmAttester("/root", files=kernel).attest(runtime(kind))
        assert kernel.entries == {}


@pytest.mark.threat("ATT-1")
def test_another_writer_of_the_entry_is_noticed() -> None:
    wanted = runtime("tdx")
    once = Configfs("tdx_guest", other_writers=1)
    assert TsmAttester("/root", files=once).attest(wanted) == b"report of " + wanted.binding()
    with pytest.raises(UnavailableError, match="somebody else"):
        TsmAttester("/root", files=Configfs("tdx_guest", other_writers=9)).attest(wanted)


def test_no_configfs_and_a_failing_one(tmp_path: Path) -> None:
    with pytest.raises(ControlMissing):
        TsmAttester(str(tmp_path / "none")).attest(runtime("tdx"))
    # A plain directory takes the entry, and has none of its files.
    with pytest.raises(UnavailableError):
        TsmAttester(str(tmp_path)).attest(runtime("tdx"))
    assert list(tmp_path.iterdir()) == []


def test_certificate_tables() -> None:
    assert certificates(b"") == () and certificates(bytes(24)) == ()
    whole = table((VCEK, b"vcek"))
    assert certificates(whole) == (b"vcek",)
    with pytest.raises(MalformedError):
        certificates(whole[:-1])


# --- the simulated platform's socket ---


def platform(answer: Callable[[socket.socket, dict[str, Any]], None]) -> SimulatedAttester:
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            answer(theirs, read_frame(theirs))

    threading.Thread(target=serve, daemon=True).start()
    return SimulatedAttester(ours)


def test_the_platform_is_asked_with_binding_and_nonce(world: Any) -> None:
    module = world.root.module("m")

    def answer(sock: socket.socket, request: dict[str, Any]) -> None:
        assert set(request) == {"op", "user_data", "nonce"} and request["op"] == "attest"
        pcrs = {0: b"a" * 48, 1: b"b" * 48, 2: b"c" * 48}
        write_frame(sock, {"evidence": module.document(pcrs, request["user_data"], request["nonce"])})

    from isolate.attestation.verifiers.simulated import verify

    attester = platform(answer)
    claims = verify(attester.attest(runtime("simulated")), at=NOW, anchors=[world.root.fingerprint])
    assert claims.binding == runtime("simulated").binding() and claims.nonce == b"n" * 32
    attester._socket.close()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", UnavailableError), (b"\0\0\0\x09\xa0", UnavailableError), (b"\xff\xff\xff\xff", MalformedError),
        (struct.pack(">I", MAX_FRAME + 1), MalformedError), (b"\0\0\0\x01\x01", MalformedError),
        (b"\0\0\0\x01\xa0", MalformedError), (b"\0\0\0\x01\xff", MalformedError),
    ],
)  # fmt: skip
def test_odd_answers_of_the_platform(data: bytes, error: type[IsolateError]) -> None:
    attester = platform(lambda sock, request: sock.sendall(data))
    with pytest.raises(error):
        attester.attest(runtime("simulated"))
    attester._socket.close()


def test_a_platform_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(UnavailableError):
        SimulatedAttester(ours).attest(runtime("simulated"))
