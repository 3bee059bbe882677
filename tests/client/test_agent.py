"""The signing agent: what it signs, for whom, and how a signer finds that it is away."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolate.client import agent as agents
from isolate.client import signers
from isolate.client.agent import (
    MAX_FRAME,
    MAX_SIGNED,
    Agent,
    AgentAnswer,
    AgentRequest,
    AgentServer,
    frame,
    read_frame,
)
from isolate.client.signers import AgentSigner, FileSigner, open_signer
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import HolderRefused, KeyFormatError, MalformedError, RefusedError, UnavailableError, UsageError

MINE = {Purpose.BLOCK, Purpose.INVOCATION, Purpose.HOLDER_REQUEST, Purpose.CHANNEL_HOLDER}
Start = Callable[..., AgentServer]


def rest(sock: socket.socket, sent: bytes) -> bytes:
    """Everything that comes after this was sent, until the other end hangs up."""
    got = b""
    sock.settimeout(5)
    with contextlib.suppress(ConnectionError):
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        while part := sock.recv(4096):
            got += part
    return got


def test_an_agent_signs_as_the_key_does(key: SigningKey, agent: Start) -> None:
    signer = AgentSigner(agent(key).address)
    assert signer.verifying_key == key.verifying_key
    for purpose in MINE:
        assert key.verifying_key.verify(purpose, b"message", signer.sign(purpose, b"message"))
    assert repr(signer).startswith("AgentSigner('unix:")
    signer.close()
    assert signer.sign(Purpose.BLOCK, b"again")


@pytest.mark.threat("HND-8")
def test_an_agent_signs_nothing_but_what_a_holder_signs(key: SigningKey, agent: Start) -> None:
    signer = AgentSigner(agent(key).address)
    for purpose in set(Purpose) - MINE:
        with pytest.raises(RefusedError) as refused:
            signer.sign(purpose, b"message")
        assert refused.value.code == "agent_refused"
    with pytest.raises(RefusedError):
        signer.sign(Purpose.INVOCATION, bytes(MAX_SIGNED + 1))
    # Still there for what it does sign.
    assert signer.sign(Purpose.INVOCATION, b"message")
    with pytest.raises(UsageError):
        Agent(key, purposes={Purpose.GRANT})
    narrow = AgentSigner(agent(key, "narrow", purposes=MINE - {Purpose.BLOCK}).address)
    with pytest.raises(RefusedError):
        narrow.sign(Purpose.BLOCK, b"message")


@pytest.mark.threat("HND-9")
def test_another_user_is_hung_up_on(key: SigningKey, agent: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = os.umask(0o027)
    server = agent(key)
    assert os.umask(mask) == 0o027  # only the socket's file was made under another
    path = Path(server.address.removeprefix("unix:"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setattr(agents, "_user", lambda: os.geteuid() + 1)
    signer = AgentSigner(server.address)
    with pytest.raises(UnavailableError):
        signer.sign(Purpose.INVOCATION, b"message")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(str(path))
        # Not even the public key.
        assert rest(stranger, frame(AgentRequest("", b"").encode())) == b""


@given(st.binary(max_size=200))
def test_any_bytes_get_an_answer(body: bytes) -> None:
    answer = AgentAnswer.parse(AGENT.answer(body))
    assert (answer.signature, answer.code) == (b"", "malformed")


AGENT = Agent(SigningKey.generate())


@pytest.mark.parametrize(
    "sent",
    [b"", b"\0\0", b"\0\0\0\0", (MAX_FRAME + 1).to_bytes(4), b"\0\0\0\x09abc", frame(b"x"), b"\xff" * 99],
    ids=["nothing", "half a length", "empty", "too long", "cut off", "no CBOR", "ones"],
)
def test_who_sends_what_is_no_request_ends_its_own_connection_only(
    sent: bytes, key: SigningKey, agent: Start
) -> None:
    server = agent(key)
    good = AgentSigner(server.address)
    assert good.sign(Purpose.BLOCK, b"one")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as odd:
        odd.connect(server.address.removeprefix("unix:"))
        rest(odd, sent)
    assert good.sign(Purpose.BLOCK, b"two")


@pytest.mark.parametrize(
    "sent", [b"\0\0", b"\0\0\0\0", (MAX_FRAME + 1).to_bytes(4), b"\xff" * 4, b"\0\0\0\x09abc", b"\0\0\0\x09"]
)
def test_a_length_that_is_none_is_refused_before_anything_is_read_for_it(sent: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.settimeout(5)
        here.sendall(sent)
        if len(sent) != 4 or sent == b"\0\0\0\x09":  # the others are refused while the peer may go on
            here.shutdown(socket.SHUT_WR)
        with pytest.raises(MalformedError):
            read_frame(there)


def test_what_is_to_be_signed_is_in_no_repr() -> None:
    for shown in (AgentRequest(Purpose.BLOCK, b"canary"), AgentAnswer(bytes(64), b"canary", "")):
        assert "canary" not in repr(shown)


def code(attempt: Callable[[], Any]) -> str:
    with pytest.raises(UnavailableError) as away:
        attempt()
    return away.value.code


def test_an_agent_that_is_away(key: SigningKey, agent: Start, tmp_path: Path) -> None:
    signer = AgentSigner(f"unix:{tmp_path / 'agent'}")
    assert code(lambda: signer.verifying_key) == "agent_unavailable"
    server = agent(key)
    assert signer.sign(Purpose.BLOCK, b"there")
    server.close()
    signer.close()
    assert code(lambda: signer.sign(Purpose.BLOCK, b"gone")) == "agent_unavailable"
    # A file that is no socket, and one where nobody listens.
    (tmp_path / "plain").write_text("x")
    assert code(lambda: AgentSigner(f"unix:{tmp_path / 'plain'}").verifying_key) == "agent_unavailable"
    for address in ("tcp:127.0.0.1:1", "nowhere", "unix:"):
        with pytest.raises(UsageError):
            AgentSigner(address)
    with pytest.raises(UsageError):
        AgentServer(Agent(key), "tcp:127.0.0.1:0")


class Puppet:
    """Listens as an agent does, and answers what the test says."""

    def __init__(self, path: Path, *answers: bytes) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        self._sock.listen()
        self._answers = iter(answers)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with self._sock:
            for answer in self._answers:
                sock, _ = self._sock.accept()
                with sock:
                    read_frame(sock)
                    sock.sendall(answer)


def answer(key: SigningKey, signature: bytes = b"", code: str = "") -> bytes:
    return frame(AgentAnswer(key.verifying_key.to_bytes(), signature, code).encode())


def test_an_agent_that_was_restarted_is_found_again(key: SigningKey, tmp_path: Path) -> None:
    signature = key.sign(Purpose.BLOCK, b"m")
    puppet = Puppet(tmp_path / "p", answer(key), answer(key, signature), answer(key, signature))
    signer = AgentSigner(f"unix:{tmp_path / 'p'}")
    assert signer.verifying_key == key.verifying_key
    # The puppet hangs up after each answer, as an agent that ended.
    assert signer.sign(Purpose.BLOCK, b"m") == signer.sign(Purpose.BLOCK, b"m") == signature
    del puppet
    signer.close()


def test_an_agent_that_does_not_answer_is_waited_for_so_long(
    key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signers, "TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        deaf.listen()
        signer, said = AgentSigner(f"unix:{tmp_path / 'deaf'}"), list[str]()
        asks = threading.Thread(target=lambda: said.append(code(lambda: signer.verifying_key)), daemon=True)
        asks.start()
        asks.join(5)
    assert said == ["agent_unavailable"]


@pytest.mark.threat("HND-7")
def test_an_interrupted_signature_is_not_taken_for_the_next(
    key: SigningKey, agent: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = AgentSigner(agent(key).address)
    assert signer.verifying_key == key.verifying_key

    def interrupted(_: socket.socket) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(signers, "read_frame", interrupted)
        with pytest.raises(KeyboardInterrupt):
            signer.sign(Purpose.BLOCK, b"one")
    assert signer.sign(Purpose.BLOCK, b"two") == key.sign(Purpose.BLOCK, b"two")
    signer.close()


def test_threads_get_each_its_own_signature(key: SigningKey, agent: Start) -> None:
    signer, wrong = AgentSigner(agent(key).address), list[bytes]()

    def use(name: int) -> None:
        for number in range(20):
            message = bytes([name, number])
            try:
                assert signer.sign(Purpose.BLOCK, message) == key.sign(Purpose.BLOCK, message)
            except Exception:
                wrong.append(message)

    threads = [threading.Thread(target=use, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert wrong == []
    signer.close()


@pytest.mark.threat("HND-10")
def test_what_another_agent_signs_is_not_taken(key: SigningKey, tmp_path: Path) -> None:
    other = SigningKey.generate()
    for number, false in enumerate((
        answer(key, other.sign(Purpose.BLOCK, b"m")),
        answer(key, key.sign(Purpose.BLOCK, b"another message")),
        answer(key, key.sign(Purpose.INVOCATION, b"m")),
        answer(key),
        answer(other, other.sign(Purpose.BLOCK, b"m")),
    )):  # fmt: skip
        Puppet(tmp_path / f"p{number}", answer(key), false)
        signer = AgentSigner(f"unix:{tmp_path / f'p{number}'}")
        assert signer.verifying_key == key.verifying_key
        with pytest.raises(HolderRefused):
            signer.sign(Purpose.BLOCK, b"m")
        signer.close()


@pytest.mark.parametrize(
    "said", [b"", b"\0\0\0\x01x", frame(b"x" * 100), (MAX_FRAME + 1).to_bytes(4), b"\0\0\0\x09ab"]
)
def test_an_agent_that_answers_nonsense(said: bytes, tmp_path: Path) -> None:
    Puppet(tmp_path / "p", said)
    signer = AgentSigner(f"unix:{tmp_path / 'p'}")
    with pytest.raises((RefusedError, UnavailableError)):
        _ = signer.verifying_key
    signer.close()


def test_a_signer_of_an_agent_travels_and_a_key_file_does_not(
    key: SigningKey, agent: Start, tmp_path: Path
) -> None:
    server = agent(key)
    key.save(tmp_path / "me.key")
    signer = AgentSigner(server.address)
    assert signer.verifying_key == key.verifying_key
    copied = pickle.loads(pickle.dumps(signer))
    assert copied.sign(Purpose.BLOCK, b"m") == key.sign(Purpose.BLOCK, b"m")
    with pytest.raises(UsageError):
        pickle.dumps(FileSigner(tmp_path / "me.key"))
    for text, kind in ((server.address, AgentSigner), (str(tmp_path / "me.key"), FileSigner)):
        assert type(open_signer(text)) is kind
        assert open_signer(text).verifying_key == key.verifying_key
    with pytest.raises(KeyFormatError):
        (tmp_path / "odd.key").write_text("no key\n")
        open_signer(str(tmp_path / "odd.key"))


def test_more_clients_than_it_serves_at_once_wait_for_nobody(
    key: SigningKey, agent: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "MAX_CLIENTS", 2)
    server = agent(key)
    first, second, third = (AgentSigner(server.address) for _ in range(3))
    assert first.verifying_key == second.verifying_key
    assert code(lambda: third.verifying_key) == "agent_unavailable"
    first.close()
    for _ in range(200):
        try:
            assert third.verifying_key == key.verifying_key
            break
        except UnavailableError:
            threading.Event().wait(0.01)
    assert third.sign(Purpose.BLOCK, b"m")
