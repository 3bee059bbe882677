"""What a user asks: what if the service is killed, its disk full or slow, its state restored, its memory dumped?

Real processes: `isolate serve`, and enclaves that speak to it over its socket.
"""

from __future__ import annotations

import base64
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import sealed
from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.attestation.policy import Policy, Reference
from isolate.client.owner import Owner
from isolate.crypto import cbor
from isolate.crypto.kem import Identity
from isolate.crypto.signing import Purpose, SigningKey, VerifyingKey
from isolate.errors import IsolateError
from isolate.launch.root import SimulatedRoot
from isolate.messages.attest import (
    AttestAnswer,
    AttestRequest,
    Challenge,
    ChallengeRequest,
    Release,
    ReleaseContext,
    ReleaseRequest,
)
from isolate.messages.base import Answer, Message, Signed
from isolate.messages.http import ask, post
from isolate.messages.owner import AssetRule, Done, LogAnswer, LogRequest
from isolate.sealed.recipients import Passphrase
from isolate.service import state as states
from isolate.service.keyring import Keyring
from isolate.transparency import Checkpoint, ConsistencyProof, InclusionProof

REGISTERS = {index: bytes([index + 1]) * 48 for index in range(3)}
ASSET = "acme/model"


class Enclave:
    """One attested instance, as the service sees it; it keeps every byte that it sent."""

    def __init__(self, owner: Owner, root: SimulatedRoot, rank: int) -> None:
        self.owner, self.rank, self.token = owner, rank, ""
        self._module, self.identity, self._signing = root.module("m"), Identity.generate(), SigningKey.generate()
        self._keys = {
            "hpke": self.identity.recipient.raw,
            "sign": self._signing.verifying_key.to_bytes(),
            "channel": os.urandom(32),
        }

    def evidence(self) -> AttestRequest:
        asked = ChallengeRequest(os.urandom(32), "job", self.rank)
        challenge = post(self.owner._service, "challenge", asked, Challenge)
        slot = Slot(challenge.job, challenge.rank, challenge.generation)
        runtime = Runtime(
            kind="simulated", nonce=challenge.nonce, keys_digest=KeyDigests.of(self._keys).digest, purpose="p",
            slot=slot,
        )  # fmt: skip
        evidence = self._module.document(REGISTERS, runtime.binding(), runtime.nonce)
        return AttestRequest(Envelope("simulated", evidence, (), runtime).encode(), self._keys)

    def attest(self) -> AttestRequest:
        request = self.evidence()
        self.token = post(self.owner._service, "attest", request, AttestAnswer).token
        return request

    def request(self, digest: bytes) -> Signed:
        body = ReleaseRequest(digest, [], os.urandom(32)).encode()
        audience = self.owner.certificate.audience
        return Signed.make(Purpose.ENCLAVE_REQUEST, self._signing, body, os.urandom(32), audience, self.token)

    def release(self, request: Signed) -> Release:
        return ask(self.owner._service, "release", request, Release, self.owner.certificate.release_key)


class Shop:
    """An owner whose service runs as a process, with a policy and one asset."""

    def __init__(self, folder: Path, serving: Callable[..., Any]) -> None:
        self.folder, self._serving = folder, serving
        self.root, self.head = SimulatedRoot.generate(), folder / "head"
        self.service = serving()
        self.key = SigningKey.load(folder / "owner.key")
        self.owner = Owner(self.key, service=self.service.address, lineage="acme")
        registers = {f"PCR{index}": value for index, value in REGISTERS.items()}
        self.owner.set_policy(
            Policy(
                lineage="acme", sequence=1, references=(Reference("program", "simulated", registers),),
                simulated_anchors=(self.root.fingerprint,), INSECURE_accept_simulated=True,
            )
        )  # fmt: skip
        self.owner.set_rule(ASSET, readers=["program"])
        path = folder / "model.sealed"
        recipients = [self.owner.certificate.sealing_recipient()]
        sealed.save_file({"w": np.arange(9.0)}, path, recipients=recipients, sign=self.key, model_id=ASSET)
        self.digest = self.owner.register(path).digest

    def again(self, *words: str) -> None:
        self.service = self._serving(f"unix:{self.folder}/socket", *words)

    def told(self, route: str, request: Message) -> str:
        """The code of the refusal, or nothing."""
        return code(
            lambda: post(self.service.address, route, request, AttestAnswer if route == "attest" else Answer)
        )

    def log(self, old: int = 0, index: int | None = None) -> tuple[LogAnswer, Checkpoint]:
        answer = post(self.service.address, "log", LogRequest(old, index), LogAnswer)
        certificate = self.owner.certificate
        return answer, Checkpoint.verify(answer.checkpoint, certificate.origin, certificate.log_key.ed25519)


@pytest.fixture
def shop(tmp_path: Path, serving: Callable[..., Any]) -> Shop:
    return Shop(tmp_path, serving)


def entry(shop: Shop, index: int) -> str:
    """The kind of this entry, once it is proved to stand in the log."""
    answer, checkpoint = shop.log(index=index)
    InclusionProof(index, checkpoint.size, tuple(answer.inclusion)).verify(answer.entry or b"", checkpoint)
    kind: str = cbor.decode(answer.entry or b"")["kind"]
    return kind


def code(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except IsolateError as error:
        return error.code
    return ""


class Load:
    """Clients that ask until the service is gone; all that they sent and were answered."""

    def __init__(self, shop: Shop, ranks: range) -> None:
        self.shop = shop
        self.enclaves = [Enclave(shop.owner, shop.root, rank) for rank in ranks]
        self.released: list[tuple[Enclave, Signed, Release]] = []
        self.told: list[tuple[Signed, int]] = []
        self.unanswered: list[tuple[str, Signed]] = []
        self.attested: list[AttestRequest] = []
        self.threads = [threading.Thread(target=self._enclave, args=(one,)) for one in self.enclaves]
        self.threads.append(threading.Thread(target=self._owner))

    def _enclave(self, enclave: Enclave) -> None:
        with suppress(IsolateError):
            while True:
                self.attested.append(enclave.attest())
                for _ in range(5):
                    request = enclave.request(self.shop.digest)
                    self.unanswered.append(("release", request))
                    self.released.append((enclave, request, enclave.release(request)))
                    self.unanswered.remove(("release", request))

    def _owner(self) -> None:
        certificate = self.shop.owner.certificate
        with suppress(IsolateError):
            while True:
                body = AssetRule("other", [], []).encode()
                request = Signed.make(
                    Purpose.OWNER_REQUEST, self.shop.key, body, os.urandom(32), certificate.audience
                )
                self.unanswered.append(("owner/rule", request))
                done = ask(self.shop.service.address, "owner/rule", request, Done, certificate.release_key)
                self.told.append((request, done.log_index))
                self.unanswered.remove(("owner/rule", request))

    def run(self, seconds: float, least: int) -> None:
        """Kill it after this time, and after as many answers to enclaves and to the owner, however slow it is."""
        for thread in self.threads:
            thread.start()
        time.sleep(seconds)
        end = time.monotonic() + 60
        while min(len(self.released), len(self.told)) < least and time.monotonic() < end:
            time.sleep(0.005)
        self.shop.service.end(signal.SIGKILL)
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def kill_under_load(shop: Shop, times: int, dice: random.Random) -> tuple[int, int]:
    """Kill it, start it, and ask everything again. Answers how many releases and owner's words were answered."""
    releases, words, seen = 0, 0, shop.log()[1]
    for number in range(times):
        load = Load(shop, range(number * 2, number * 2 + 2))
        load.run(dice.uniform(0.05, 0.6), least=6 if number % 5 else 0)
        shop.again()
        # The log only grew, and holds all that was answered, each at its own place.
        answer, now = shop.log(seen.size)
        ConsistencyProof(seen.size, now.size, tuple(answer.consistency)).verify(seen, now)
        places = [ReleaseContext.parse(one.context).log_index for _, _, one in load.released]
        assert len(set(places)) == len(places)
        for index in places:
            assert entry(shop, index) == "release"
        for _, index in load.told:
            assert entry(shop, index) == "rule"
        # What was answered is not taken again; what was not was done or was not, and is taken once at most.
        for _, signed, _ in load.released:
            assert shop.told("release", signed) == "replayed"
        for signed, _ in load.told:
            assert shop.told("owner/rule", signed) == "replayed"
        for route, signed in load.unanswered:
            tries = [shop.told(route, signed) for _ in range(2)]
            assert tries[0] in ("", "replayed"), tries
            assert tries[1] == "replayed"
        for evidence in load.attested:
            assert shop.told("attest", evidence) == "nonce_refused"
        releases, words, seen = releases + len(places), words + len(load.told), shop.log()[1]
    return releases, words


@pytest.mark.threat("SVC-75")
def test_a_kill_under_load_loses_nothing_that_was_answered(shop: Shop) -> None:
    kill_under_load(shop, 1, random.Random(1))


@pytest.mark.slow
@pytest.mark.threat("SVC-75")
def test_25_kills_at_random_under_load(shop: Shop) -> None:
    releases, words = kill_under_load(shop, 25, random.Random(2))
    # The kills came in the middle of work.
    assert releases > 100
    assert words > 100


@pytest.mark.threat("SVC-76")
def test_a_full_disk_does_nothing_by_halves_and_is_got_over(shop: Shop) -> None:
    """As the disk does: no file of the service can grow any more."""
    owner, process = shop.owner, shop.service.process.pid
    enclave = Enclave(owner, shop.root, 0)
    enclave.attest()
    largest = max(path.stat().st_size for path in (shop.folder / "state").iterdir())
    size = shop.log()[1].size
    resource.prlimit(process, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    refused: list[Signed] = []
    for _ in range(2000):
        request = enclave.request(shop.digest)
        error = code(lambda request=request: enclave.release(request))
        if error:
            assert error == "storage"
            refused.append(request)
        else:
            size += 1
        if len(refused) == 5:
            break
    assert len(refused) == 5
    resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert shop.log()[1].size == size
    # Nothing of what was refused had been done, its nonce included.
    enclave.release(refused[0])
    assert shop.log()[1].size == size + 1
    assert shop.service.end() == 0


@pytest.mark.threat("SVC-76")
def test_a_slow_disk_keeps_no_queue_that_grows(realm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "TURN", 0.05)
    held, go = threading.Event(), threading.Event()

    def slow() -> None:
        with realm.state.transaction():
            held.set()
            assert go.wait(20)

    thread = threading.Thread(target=slow)
    thread.start()
    assert held.wait(20)
    rows = [code(lambda: realm.rule("a/b")) for _ in range(3)]
    go.set()
    thread.join()
    assert rows == ["busy"] * 3
    assert realm.entries("rule") == []
    realm.rule("a/b")


@pytest.mark.threat("SVC-70")
@pytest.mark.slow
def test_a_restored_service_is_recovered_on_the_command_line(
    shop: Shop, tmp_path: Path, serving: Callable[..., Any]
) -> None:
    state, key = tmp_path / "state", str(tmp_path / "owner.key")
    verify = [
        "log", "verify", "--lineage", "acme", "--owner", str(shop.key.verifying_key),
        "--remember", str(tmp_path / "seen"), "--service",
        shop.service.address,
    ]  # fmt: skip
    shop.service.end()
    shutil.copytree(state, tmp_path / "copy")
    shop.again()
    shop.owner.set_rule("later")
    assert isolate(*verify).returncode == 0
    shop.service.end()
    shutil.rmtree(state)
    shutil.move(tmp_path / "copy", state)
    shutil.copy(tmp_path / "seen", shop.head)
    refused = isolate(
        "serve", "--state", str(state), "--listen", shop.service.address, "--checkpoint", str(shop.head),
        "--passphrase-file", str(tmp_path / "passphrase"),
    )  # fmt: skip
    assert (refused.returncode, "log_shrunk" in refused.stderr) == (1, True), refused.stderr
    shop.again("--recover", key)
    before = int(shop.owner.certificate.audience.rpartition("/")[2])
    now = before + 1
    assert (tmp_path / f"head.before-{now}").exists()
    shop.owner = Owner(shop.key, service=shop.service.address, lineage="acme")
    assert shop.owner.certificate.audience == f"svc/{now}"
    refused = isolate(*verify)
    assert (refused.returncode, "log_recovered" in refused.stderr) == (1, True), refused.stderr
    accepted = isolate(*verify, "--accept-epoch", str(now))
    assert accepted.returncode == 0, accepted.stderr
    assert (tmp_path / f"seen.before-{now}").exists()
    # The owner says again what holds, on the command line.
    word = ["--sign", key, "--service", shop.service.address, "--lineage", "acme"]
    (tmp_path / "policy.toml").write_text(
        Policy(
            lineage="acme", sequence=2, INSECURE_accept_simulated=True, simulated_anchors=(shop.root.fingerprint,),
            references=(Reference("program", "simulated", {f"PCR{n}": one for n, one in REGISTERS.items()}),),
        ).to_toml()
    )  # fmt: skip
    for words in (
        ["owner", "policy", str(tmp_path / "policy.toml")],
        ["owner", "rule", ASSET, "--reader", "program"],
        ["rollback", ASSET, "--to", shop.digest.hex()],
    ):
        done = isolate(*words, *word)
        assert done.returncode == 0, done.stderr
    enclave = Enclave(shop.owner, shop.root, 0)
    enclave.attest()
    enclave.release(enclave.request(shop.digest))
    refused = isolate("explain", "0" * 16, *word)
    assert refused.returncode == 2, refused.stderr
    with pytest.raises(IsolateError) as error:
        enclave.release(enclave.request(bytes(32)))
    done = isolate("explain", error.value.request_id or "", *word)
    assert done.returncode == 0, done.stderr
    assert "7 file               FAILED" in done.stdout


def isolate(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "isolate", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.threat("SVC-25")
def test_no_secret_lies_in_the_state_the_logs_or_a_core(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that the service handled, in every form, in all that it left behind: also when it crashes."""
    enclave = Enclave(shop.owner, shop.root, 0)
    enclave.attest()
    request = enclave.request(shop.digest)
    release = enclave.release(request)
    with enclave.identity.open(release.box, info=release.context) as opened:
        released = cbor.decode(opened.expose())
    with suppress(IsolateError):
        enclave.release(enclave.request(bytes(32)))
    limits = Path(f"/proc/{shop.service.process.pid}/limits").read_text().splitlines()
    assert [line.split()[4:6] for line in limits if line.startswith("Max core file size")] == [["0", "0"]]
    shop.service.process.send_signal(signal.SIGSEGV)
    shop.service.process.wait(30)
    assert shop.service.process.returncode == -signal.SIGSEGV

    passphrase = (tmp_path / "passphrase").read_text().strip()
    owner = VerifyingKey.parse(str(shop.key.verifying_key))
    keys = Keyring.load(tmp_path / "state", owner=owner, unlock=Passphrase(passphrase))
    secrets = {name: bytes(seed.expose()) for name, seed in keys.seeds.items()}
    secrets |= {f"released {name}": one for name, one in released.items()}
    secrets["file key"] = bytes(keys.unlock(sealed.public_facts(tmp_path / "model.sealed")).expose())
    secrets["owner"] = bytes(shop.key._seed.expose())
    secrets["passphrase"] = passphrase.encode()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    mine = {tmp_path / "owner.key", tmp_path / "passphrase"}
    assert not [path for path in left if path.name.startswith("core")]
    assert any(path.name == "state.db" for path in left)
    assert shop.service.errors.read_text().count("request.answered") > 3
    for name, raw in secrets.items():
        for form in (raw, raw.hex().encode(), base64.b64encode(raw)[:40], base64.urlsafe_b64encode(raw)[:40]):
            found = [path.name for path in left if path not in mine and form in path.read_bytes()]
            assert found == [], (name, found)
    # The search finds what is there.
    seed = base64.urlsafe_b64encode(secrets["owner"])[:40]
    assert seed in (tmp_path / "owner.key").read_bytes()
