"""The service: releases a second, the time of an attestation, and what a longer log costs.

release_per_s is key releases a second by four clients at once over a Unix socket, each committed with full sync
before it is answered. attest_roundtrip_ms is a challenge and an attestation, evidence made in between.
log_append_growth is the time of one append and commit to a log of 1,000,000 entries over that to one of 1,000,
bulk-loaded, both without sync, so that the disk hides nothing; with --quick the longer one has 20,000.

    >>> SMALL < QUICK < LARGE
    True
"""

from __future__ import annotations

import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from isolate import sealed
from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.attestation.policy import Policy, Reference
from isolate.cli.bench import Figures, paired
from isolate.client.owner import Owner
from isolate.crypto import merkle
from isolate.crypto.kem import Identity
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import ServiceUnavailable
from isolate.launch.root import SimulatedRoot
from isolate.messages.attest import (
    AttestAnswer,
    AttestRequest,
    Challenge,
    ChallengeRequest,
    Release,
    ReleaseRequest,
)
from isolate.messages.base import M, Message, Signed
from isolate.messages.http import ask, post
from isolate.sealed.recipients import Passphrase
from isolate.service.log import Log, public_entry
from isolate.service.state import State, create

ASSET, CLIENTS = "bench/model", 4
SMALL, LARGE, QUICK = 1_000, 1_000_000, 20_000
BATCH = 10_000  # entries of a log that are loaded at once
REGISTERS = {index: bytes([index + 1]) * 48 for index in range(3)}


class Load:
    """One attested instance, as the service sees it; no process, so that nothing but the service is measured."""

    def __init__(self, owner: Owner, address: str, root: SimulatedRoot, rank: int) -> None:
        self._owner, self._address, self._rank = owner, address, rank
        self._module = root.module("bench")
        self._identity, self._signing = Identity.generate(), SigningKey.generate()
        self._keys = {
            "hpke": self._identity.recipient.raw,
            "sign": self._signing.verifying_key.to_bytes(),
            "channel": secrets.token_bytes(32),
        }
        self._token = ""

    def attest(self) -> float:
        """Seconds for a challenge and an attestation."""
        begin = time.perf_counter()
        asked = ChallengeRequest(secrets.token_bytes(32), "bench", self._rank)
        challenge = post(self._address, "challenge", asked, Challenge)
        slot = Slot(challenge.job, challenge.rank, challenge.generation)
        digest = KeyDigests.of(self._keys).digest
        runtime = Runtime(kind="simulated", nonce=challenge.nonce, keys_digest=digest, purpose="bench", slot=slot)
        evidence = self._module.document(REGISTERS, runtime.binding(), runtime.nonce)
        request = AttestRequest(Envelope("simulated", evidence, (), runtime).encode(), self._keys)
        self._token = post(self._address, "attest", request, AttestAnswer).token
        return time.perf_counter() - begin

    def ask(self, route: str, body: Message, answer: type[M]) -> M:
        """Ask something as the instance does: signed, under its result, and answered with a signature."""
        certificate, nonce = self._owner.certificate, secrets.token_bytes(32)
        purpose = Purpose.ENCLAVE_REQUEST
        request = Signed.make(purpose, self._signing, body.encode(), nonce, certificate.audience, self._token)
        return ask(self._address, route, request, answer, certificate.release_key)

    def release(self, digest: bytes) -> None:
        """Have the keys of the file with this digest released, once."""
        self.ask("release", ReleaseRequest(digest, [], secrets.token_bytes(32)), Release)


@contextmanager
def served(folder: Path) -> Iterator[tuple[Owner, str, SimulatedRoot, bytes]]:
    """`isolate serve` as its users run it, with a policy and one small asset; the asset's digest."""
    key, root, address = SigningKey.generate(), SimulatedRoot.generate(), f"unix:{folder}/service"
    key.save(folder / "owner.key")
    command = [sys.executable, "-m", "isolate", "serve", "--state", f"{folder}/state", "--listen", address]
    command += ["--init", f"{folder}/owner.key", "--passphrase-file", f"{folder}/passphrase"]
    # One peer asks for everybody here: no rate, for what is measured is the service and not its limit.
    command += ["--name", "bench", "--lineage", "bench", "--rate", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            for line in process.stdout or ():
                if "serving on" in line:
                    break
            else:
                raise ServiceUnavailable("the service did not start", hint="try `isolate serve` alone")
            owner = Owner(key, service=address, lineage="bench")
            registers = {f"PCR{index}": value for index, value in REGISTERS.items()}
            policy = Policy(
                lineage="bench",
                sequence=1,
                references=(Reference("bench", "simulated", registers),),
                simulated_anchors=(root.fingerprint,),
                INSECURE_accept_simulated=True,
            )
            owner.set_policy(policy)
            owner.set_rule(ASSET, readers=["bench"])
            path = folder / "asset.sealed"
            recipients = [owner.certificate.sealing_recipient()]
            sealed.save_file({"w": np.zeros(4)}, path, recipients=recipients, sign=key, model_id=ASSET)
            yield owner, address, root, owner.register(path).digest
        finally:
            process.terminate()


def _releases(loads: list[Load], digest: bytes, count: int) -> float:
    """Releases a second, by all the loads at once, ``count`` each."""

    def work(load: Load) -> None:
        for _ in range(count):
            load.release(digest)

    begin = time.perf_counter()
    with ThreadPoolExecutor(len(loads)) as pool:
        list(pool.map(work, loads))  # raises what one of them raised
    return len(loads) * count / (time.perf_counter() - begin)


_UNLOCK = Passphrase("for a log of nothing", memory=64, passes=1)


class _Rows:
    """A tree store that remembers what it is given as rows; the tree itself lies in a MemoryStore."""

    def __init__(self) -> None:
        self._tree = merkle.MemoryStore()
        self.rows: list[tuple[int, int, bytes]] = []

    def get(self, level: int, index: int) -> bytes | None:
        return self._tree.get(level, index)

    def put(self, level: int, index: int, value: bytes) -> None:
        self._tree.put(level, index, value)
        self.rows.append((level, index, value))


class _Unsynced(State):
    """A state that syncs nothing, so that the disk does not hide what the log costs."""

    def __init__(self, folder: Path, *, clock: Callable[[], int]) -> None:
        super().__init__(folder, unlock=_UNLOCK, clock=clock)
        self._database.execute("PRAGMA synchronous=OFF")


def load_log(state: State, count: int) -> None:
    """Fill an empty log with ``count`` entries, in bulk."""
    nodes, salt = _Rows(), bytes(32)
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        entries = [public_entry("use", 1_700_000_000 + n, salt, n.to_bytes(8, "big")) for n in numbers]
        merkle.extend(nodes, start, entries)
        rows = ((n, entry, salt, b"") for n, entry in zip(numbers, entries, strict=True))
        with state.transaction() as database:
            database.executemany("INSERT INTO entry VALUES (?, ?, ?, ?)", rows)
            database.executemany("INSERT INTO node VALUES (?, ?, ?)", sorted(nodes.rows))
            nodes.rows.clear()


def _append(state: State, log: Log, count: int) -> float:
    """Seconds for one append and its commit, the mean of ``count``."""
    begin = time.perf_counter()
    for number in range(count):
        with state.transaction() as database:
            log.append(database, "use", {"number": number})
    return (time.perf_counter() - begin) / count


def _growth(folder: Path, rounds: int, quick: bool) -> Figures:
    with ExitStack() as undo:
        measures = {}
        for name, size in (("small", SMALL), ("large", QUICK if quick else LARGE)):
            create(
                folder / name,
                owner=SigningKey.generate(),
                name=name,
                lineage="bench",
                recovery=[],
                unlock=_UNLOCK,
                now=0,
            )
            state = undo.enter_context(_Unsynced(folder / name, clock=lambda: 1_800_000_000))
            load_log(state, size)
            log = Log(state)
            measures[name] = lambda state=state, log=log: _append(state, log, 100)
        return paired(rounds, measures, {"log_append_growth": ("large", "small")})


def run(rounds: int | None, quick: bool) -> tuple[int, Figures]:
    """The figures: 9 rounds, or 3 with ``quick``."""
    rounds = rounds or (3 if quick else 9)
    with tempfile.TemporaryDirectory(prefix="isolate-bench-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        releases: list[float] = []
        attests: list[float] = []
        with served(folder) as (owner, address, root, digest):
            loads = [Load(owner, address, root, rank) for rank in range(CLIENTS)]
            for _ in range(rounds):
                attests += [load.attest() for load in loads for _ in range(2 if quick else 5)]
                releases.append(_releases(loads, digest, 5 if quick else 50))
        growth = _growth(folder, rounds * 3, quick)
    return rounds, {
        "release_per_s": round(statistics.median(releases), 1),
        "attest_roundtrip_ms": round(statistics.median(attests) * 1000, 2),
        **growth,
    }
