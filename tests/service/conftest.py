"""A whole service in one process: its state in a folder, its clock in hand, and a courier that a test can bend.

Enclaves are real ``Workload`` objects. They speak to ``Service.answer`` directly; no socket, no process.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isolate import sealed
from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.attestation.policy import Policy, Reference, SignedPolicy
from isolate.capability.invocation import Invocation, hash_arguments
from isolate.capability.scope import Scope
from isolate.capability.token import Token, grant
from isolate.client import connect
from isolate.client import owner as owners
from isolate.crypto import cbor
from isolate.crypto.kem import Identity
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose, SigningKey
from isolate.enclave import workload as workloads
from isolate.enclave.configuration import Configuration
from isolate.enclave.workload import Workload
from isolate.errors import IsolateError
from isolate.launch.root import SimulatedRoot
from isolate.messages import http
from isolate.messages.attest import AttestAnswer, AttestRequest, Challenge, ChallengeRequest, Registered
from isolate.messages.attest import RegisterRequest as Register
from isolate.messages.base import Message, Refusal, Signed
from isolate.messages.invoke import (
    Budget,
    BudgetRequest,
    Receipt,
    Reservation,
    ReserveRequest,
    SettleRequest,
)
from isolate.messages.owner import AssetRule, Done, PolicyUpdate
from isolate.messages.receipts import ReceiptRequest, UseReceipt
from isolate.sealed.recipients import Passphrase
from isolate.service.routes import Service
from isolate.service.state import State, create

NOW = 1_780_000_000
NAME, LINEAGE, JOB = "svc", "acme", "acme/job"
UNLOCK = Passphrase("what opens its keys", memory=64, passes=1)
DIGEST = b"d" * 32  # of the operation that tokens here allow


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> int:
        return self.now


class Attester:
    """The platform as an enclave sees it: evidence over the registers of what was launched."""

    def __init__(self, root: SimulatedRoot, registers: dict[int, bytes]) -> None:
        self._module, self._registers = root.module("module-1"), registers

    def attest(self, runtime: Runtime) -> bytes:
        return self._module.document(self._registers, runtime.binding(), runtime.nonce)

    def close(self) -> None:
        pass


def registers(name: str) -> dict[int, bytes]:
    """The registers of the enclave image of this name, 48 bytes each."""
    return {index: (f"{name}-{index}".encode() * 48)[:48] for index in range(3)}


class Realm:
    """Owner, service, platform; enclaves on request. ``courier`` carries every request, and may lie."""

    def __init__(
        self, folder: Path, name: str = NAME, owner: SigningKey | None = None, like: Realm | None = None
    ) -> None:
        self.folder, self.clock, self.unlock = folder, Clock(), UNLOCK
        self.courier: Callable[[str, bytes], tuple[int, bytes]] = self.serve
        self.carried: list[tuple[str, bytes]] = []
        self.sequence = 0
        if like is not None:
            self.owner, self.recovery = like.owner, like.recovery
            self.root = SimulatedRoot(like.root._key, like.root.certificate, clock=self.clock)
            self.carried, self.sequence = list(like.carried), like.sequence
            shutil.copytree(like.folder / "state", folder / "state")
            self.open()
            return
        self.owner, self.recovery = owner or SigningKey.generate(), Identity.generate()
        self.root = SimulatedRoot.generate(clock=self.clock)
        create(
            folder / "state", owner=self.owner, name=name, lineage=LINEAGE,
            recovery=[self.recovery.recipient], unlock=UNLOCK, now=NOW, epoch=1,
        )  # fmt: skip
        self.open()
        self.set_policy()

    def open(self) -> None:
        self.state = State(self.folder / "state", unlock=self.unlock, clock=self.clock)
        # Nobody cuts the power here, and what a process wrote outlives it: no test waits for the disk.
        self.state._database.execute("PRAGMA synchronous=OFF")
        self.service = Service(self.state)

    def reopen(self) -> None:
        """As after a crash or a restart: all that was not on disk is gone."""
        self.state.close()
        self.open()

    # What is carried

    def serve(self, route: str, body: bytes) -> tuple[int, bytes]:
        status, message = self.service.answer(route, body)
        return status, message.encode()

    def post(self, _: str, route: str, request: Message, answer: type[Any], *, timeout: float = 0) -> Any:
        """In the place of isolate.messages.http.post."""
        sent = request.encode()
        self.carried.append((route, sent))
        status, body = self.courier(route, sent)
        if status != 200:
            raise http.error_of(Refusal.parse(body))
        return answer.parse(body)

    def ask(self, route: str, request: Signed, answer: type[Any]) -> Any:
        return http.ask("", route, request, answer, self.state.certificate.release_key)

    # The owner

    def owner_request(self, body: Message, key: SigningKey | None = None) -> Signed:
        return Signed.make(
            Purpose.OWNER_REQUEST,
            key or self.owner,
            body.encode(),
            Secret.generate(32).expose().tobytes(),
            self.state.audience,
        )

    def tell(self, route: str, body: Message, answer: type[Any] = Done) -> Any:
        return self.ask(f"owner/{route}", self.owner_request(body), answer)

    def policy(self, **changes: Any) -> Policy:
        self.sequence += 1
        references = tuple(
            Reference(name, "simulated", {f"PCR{index}": value for index, value in registers(name).items()})
            for name in ("reader", "writer", "other")
        )
        fields: dict[str, Any] = {
            "lineage": LINEAGE, "sequence": self.sequence, "references": references,
            "simulated_anchors": (self.root.fingerprint,), "INSECURE_accept_simulated": True,
        }  # fmt: skip
        return Policy(**(fields | changes))

    def set_policy(self, **changes: Any) -> Policy:
        policy = self.policy(**changes)
        self.tell("policy", PolicyUpdate(SignedPolicy.sign(policy, self.owner).encode()))
        return policy

    def rule(self, asset: str, *, readers: tuple[str, ...] = (), writers: tuple[str, ...] = ()) -> None:
        self.tell("rule", AssetRule(asset, list(readers), list(writers)))

    def seal(self, asset: str = "a/b", *, epoch: int = 1, sign: SigningKey | None = None, **options: Any) -> Path:
        path = self.folder / f"{asset.replace('/', '-')}-{epoch}.sealed"
        recipients = self.state.certificate.output_recipients()
        tensors = {"w": np.arange(4, dtype=np.float32) + epoch}
        sealed.save_file(
            tensors, path, recipients=recipients, sign=sign or self.owner, model_id=asset, epoch=epoch, **options
        )
        return path

    def register(self, path: Path) -> Registered:
        facts = sealed.public_facts(path)
        answer: Registered = self.tell(
            "register", Register(facts.model_id, facts.header, facts.directory), Registered
        )
        return answer

    def asset(self, asset: str = "a/b", *, readers: tuple[str, ...] = ("reader",), epoch: int = 1) -> Path:
        """A sealed file that these measurements may read."""
        path = self.seal(asset, epoch=epoch)
        self.register(path)
        self.rule(asset, readers=readers)
        return path

    # Enclaves

    def enclave(
        self, measurement: str = "reader", *, rank: int = 0, root: SimulatedRoot | None = None, **changes: Any
    ) -> Workload:
        fields: dict[str, Any] = {
            "owner": self.owner.verifying_key, "lineage": LINEAGE, "purpose": "test", "job": JOB,
            "INSECURE_accept_simulated": True,
        }  # fmt: skip
        attester: Any = Attester(root or self.root, registers(measurement))
        return Workload(Configuration(**(fields | changes)), "", rank, attester)

    def challenge(self, rank: int = 0, job: str = JOB) -> Challenge:
        answer: Challenge = self.post("", "challenge", ChallengeRequest(b"c" * 32, job, rank), Challenge)
        return answer

    def evidence(
        self,
        challenge: Challenge,
        *,
        measurement: str = "reader",
        root: SimulatedRoot | None = None,
        keys: dict[str, bytes] | None = None,
        **changes: Any,
    ) -> AttestRequest:
        """What an enclave sends; ``changes`` are of the runtime map that its evidence is bound to."""
        keys = keys or self.keys()
        fields: dict[str, Any] = {
            "kind": "simulated", "nonce": challenge.nonce, "keys_digest": KeyDigests.of(keys).digest,
            "purpose": "test", "slot": Slot(challenge.job, challenge.rank, challenge.generation),
        }  # fmt: skip
        runtime = Runtime(**(fields | changes))
        evidence = Attester(root or self.root, registers(measurement)).attest(runtime)
        return AttestRequest(Envelope("simulated", evidence, (), runtime).encode(), keys)

    @staticmethod
    def keys(sign: SigningKey | None = None) -> dict[str, bytes]:
        return {
            "hpke": Identity.generate().recipient.raw,
            "sign": (sign or SigningKey.generate()).verifying_key.to_bytes(),
            "channel": b"x" * 32,
        }

    def attest(self, request: AttestRequest) -> str:
        answer: AttestAnswer = self.post("", "attest", request, AttestAnswer)
        return answer.token

    def signed_by(self, workload: Workload, body: Message, **changes: Any) -> Signed:
        """A request as this enclave makes it; ``changes``: purpose, signer, nonce, audience, token."""
        fields: dict[str, Any] = {
            "purpose": Purpose.ENCLAVE_REQUEST, "signer": workload._signing, "body": body.encode(),
            "nonce": Secret.generate(32).expose().tobytes(), "audience": self.state.audience,
            "token": workload.token(),
        }  # fmt: skip
        return Signed.make(**(fields | changes))

    # Handles

    def grant(self, holder: SigningKey, asset: str = "a/b", epoch: int = 1, **limits: Any) -> Token:
        scope = Scope(**({"operations": {"op": DIGEST}} | limits))
        return grant(self.owner, asset=asset, scope=scope, holder=holder.verifying_key.ed25519, epoch=epoch)

    @staticmethod
    def use(token: Token, holder: SigningKey, *, bytes_out: int = 256, **changes: Any) -> ReserveRequest:
        """One use, as an enclave passes it on to be reserved; ``changes`` are of the invocation."""
        fields: dict[str, Any] = {
            "operation": "op", "operation_digest": DIGEST, "argument_hash": hash_arguments(cbor.encode({})),
            "channel_binding": b"b" * 32, "nonce": Secret.generate(16).expose().tobytes(), "counter": 1,
        }  # fmt: skip
        invocation = Invocation.sign(token, holder, **(fields | changes))
        return ReserveRequest(
            token.encode(), invocation.encode(), fields["channel_binding"], fields["argument_hash"], bytes_out
        )

    # What the service wrote

    def entries(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Details of the log's entries, each with its kind."""
        with self.state.transaction() as database:
            rows = database.execute("SELECT public, details FROM entry ORDER BY idx").fetchall()
        found = [{"kind": cbor.decode(public)["kind"], **cbor.decode(details)} for public, details in rows]
        return [one for one in found if kind in (None, one["kind"])]

    def public(self) -> list[dict[str, Any]]:
        """The log's entries as the public sees them."""
        with self.state.transaction() as database:
            return [cbor.decode(row[0]) for row in database.execute("SELECT public FROM entry ORDER BY idx")]

    def rows(self) -> dict[str, int]:
        """How many rows each table has."""
        with self.state.transaction() as database:
            names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return {name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names}

    def fail(self, statement: str) -> None:
        """From now on the database refuses what begins so, as a full disk does."""
        real = self.state._database

        def execute(sql: str, *arguments: Any) -> Any:
            if sql.startswith(statement):
                raise sqlite3.OperationalError("disk I/O error")
            return real.execute(sql, *arguments)

        self.state._database = SimpleNamespace(execute=execute, close=real.close)  # type: ignore[assignment]

    @staticmethod
    def code(attempt: Callable[[], Any]) -> str:
        """The code that this is refused with; empty when it is not."""
        try:
            attempt()
        except IsolateError as error:
            return error.code
        return ""


class Till:
    """Reserves and settles through one enclave, and answers codes."""

    def __init__(self, realm: Realm, enclave: Workload) -> None:
        self.realm, self.enclave = realm, enclave

    def reserve(self, request: ReserveRequest) -> Reservation:
        signed = self.realm.signed_by(self.enclave, request)
        reservation: Reservation = self.realm.ask("reserve", signed, Reservation)
        return reservation

    def settle(self, invocation: bytes, bytes_out: int = 256, code: str = "") -> Receipt:
        signed = self.realm.signed_by(self.enclave, SettleRequest(invocation, bytes_out, code))
        receipt: Receipt = self.realm.ask("settle", signed, Receipt)
        return receipt

    def send(self, request: ReserveRequest) -> Receipt:
        """One use from beginning to end, at the size that was reserved."""
        return self.settle(self.reserve(request).invocation, request.bytes_out)

    def code(self, request: ReserveRequest) -> str:
        """What this use is refused with; empty when its reply may leave."""
        return self.realm.code(lambda: self.send(request))

    def use(self, token: Token, holder: SigningKey, **changes: Any) -> str:
        return self.code(self.realm.use(token, holder, **changes))

    def left(self, token: Token, holder: SigningKey) -> Budget:
        budget: Budget = self._ask("budget", BudgetRequest(token.encode()), holder, Budget)
        return budget

    def receipt(self, invocation: bytes, holder: SigningKey) -> UseReceipt:
        receipt: UseReceipt = self._ask("receipt", ReceiptRequest(invocation), holder, UseReceipt)
        return receipt

    def _ask(self, route: str, body: Message, holder: SigningKey, answer: type[Any]) -> Any:
        signed = Signed.make(Purpose.HOLDER_REQUEST, holder, body.encode(), b"n" * 32, self.realm.state.audience)
        return self.realm.ask(route, signed, answer)


@pytest.fixture
def till_type() -> type[Till]:
    return Till


@pytest.fixture
def till(realm: Realm) -> Till:
    """A till on a realm with one asset, ``a/b``."""
    realm.asset()
    return Till(realm, realm.enclave())


@pytest.fixture
def tills(realm: Realm) -> tuple[Till, Till]:
    """Two enclaves on the same asset."""
    realm.asset()
    return Till(realm, realm.enclave()), Till(realm, realm.enclave(rank=1))


@pytest.fixture
def holder() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def realms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Realm]]:
    """Makes realms, each with a service of its own; requests go to the one that was made last."""
    made: list[Realm] = []

    def post(*arguments: Any, **options: Any) -> Any:
        return made[-1].post(*arguments, **options)

    for module in (http, workloads, connect, owners):
        monkeypatch.setattr(module, "post", post)
    monkeypatch.setattr(workloads, "SimulatedAttester", lambda inherited: inherited)
    monkeypatch.setattr(workloads, "_elapsed", lambda: float(made[-1].clock()))
    monkeypatch.setattr(connect, "now", lambda: made[-1].clock())

    def make(**options: Any) -> Realm:
        folder = tmp_path / f"realm-{len(made)}"
        folder.mkdir()
        # It sets its policy while it is made, so it must be the last already.
        made.append(realm := Realm.__new__(Realm))
        realm.__init__(folder, **options)  # type: ignore[misc]
        return realm

    yield make
    for realm in made:
        with suppress(Exception):
            realm.state.close()


@pytest.fixture(scope="session")
def mould(tmp_path_factory: pytest.TempPathFactory) -> Realm:
    """Made once, and closed: the realm of each test begins as a copy of it, with the same keys."""
    made = Realm.__new__(Realm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "post", made.post)
        made.__init__(tmp_path_factory.mktemp("mould"))  # type: ignore[misc]
    made.state.close()
    return made


@pytest.fixture
def realm(realms: Callable[..., Realm], mould: Realm) -> Realm:
    return realms(like=mould)


class Serving:
    """`isolate serve` as a process. ``address`` is what it says it serves on; ``errors`` holds its lines."""

    def __init__(self, folder: Path, listen: str, *words: str, **options: Any) -> None:
        self.folder, self.errors, self.status = folder, folder / "errors", -1
        line = [sys.executable, "-m", "isolate", "serve", "--listen", listen, "--state", f"{folder}/state"]
        line += ["--passphrase-file", f"{folder}/passphrase", "--checkpoint", f"{folder}/head", *words]
        if not (folder / "state").exists():
            if not (folder / "owner.key").exists():
                SigningKey.generate().save(folder / "owner.key")
            line += ["--init", f"{folder}/owner.key", "--name", NAME, "--lineage", LINEAGE]
        self.owner = SigningKey.load(folder / "owner.key")
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, **options)
        assert self.process.stdout is not None
        said = next((one for one in self.process.stdout if one.startswith("serving on ")), "")
        if not said:
            self.end()
            raise AssertionError(self.errors.read_text())
        self.address = said.split()[2]

    def end(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """The exit status, once it ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.communicate(timeout=timeout)
        self.status = self.process.returncode
        return self.status


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts services, by default on a Unix socket; those that a test leaves running are killed."""
    started: list[Serving] = []

    def start(listen: str | None = None, *words: str, **options: Any) -> Serving:
        started.append(Serving(tmp_path, listen or f"unix:{tmp_path}/socket", *words, **options))
        return started[-1]

    yield start
    for one in started:
        one.end(signal.SIGKILL)
