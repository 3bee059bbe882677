"""Two attested ends, a service that vouches for them, and an adversary between: all in memory, all seeded."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve, frozen

from isolate.attestation.evidence import KeyDigests, instance_id
from isolate.channel import Attested, Expect, Handshake, Holder
from isolate.channel.session import Endpoint, Inbox, flat
from isolate.crypto.exchange import CurveKey
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey

NOW = 1_800_000_000


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _token(issuer: SigningKey, keys: KeyDigests, job: str | None, rank: int, claims: dict[str, Any]) -> str:
    """A result token as attestation/result.py issues it, without an appraisal behind it."""
    tier = claims.get("tier", "hardware")
    submod = {
        "ear.status": "affirming" if tier == "hardware" else "contraindicated",
        "ear.trustworthiness-vector": {
            "instance-identity": 2,
            "configuration": 2,
            "executables": 2,
            "hardware": 2 if tier == "hardware" else 97,
            "runtime-opaque": 2 if tier == "hardware" else 96,
        },
        "ear.appraisal-policy-id": _text(bytes(32)),
        "isolate.lineage": claims.get("lineage", "acme/train"),
        "isolate.sequence": claims.get("sequence", 7),
        "isolate.instance": _text(instance_id(keys.digest)),
        "isolate.evidence-digest": _text(bytes(32)),
        "isolate.kind": "nitro" if tier == "hardware" else "simulated",
        "isolate.tier": tier,
        "isolate.measurement": "train-1.0",
        "isolate.purpose": "train",
        "isolate.slot": None if job is None else {"job": job, "rank": rank, "generation": 1},
        "isolate.submods": [],
    }
    body = {
        "eat_profile": "tag:github.com,2023:veraison/ear",
        "iss": "test",
        "iat": claims.get("issued", NOW - 10),
        "exp": claims.get("expires", NOW + 290),
        "eat_nonce": _text(b"n" * 32),
        "ear.verifier-id": {"developer": "isolate", "build": "isolate/v1"},
        "cnf": {"isolate.keys-digest": _text(keys.digest)},
        "submods": {"isolate": submod},
    }
    header = _text(b'{"alg":"EdDSA","typ":"JWT"}')
    signed = f"{header}.{_text(json.dumps(body, separators=(',', ':'), sort_keys=True).encode())}"
    return f"{signed}.{_text(issuer.sign_token(signed.encode()))}"


@frozen
class World:
    """One service, one job. ``clock`` can be moved by a test."""

    issuer: SigningKey
    time: list[int]

    def attested(
        self, rank: int = 0, job: str | None = "job", issuer: SigningKey | None = None, **claims: Any
    ) -> Attested:
        static, sign = Secret.generate(32), SigningKey.generate()
        public = {"channel": CurveKey(static).public, "sign": sign.verifying_key.to_bytes(), "hpke": bytes(1216)}
        keys = KeyDigests.of(public)
        return Attested(_token(issuer or self.issuer, keys, job, rank, claims), keys, static, sign)

    def renewed(self, attested: Attested, rank: int = 0, **claims: Any) -> str:
        """A new token about the same keys."""
        return _token(self.issuer, attested.keys, "job", rank, claims)

    def expect(self, rank: int | None = None, **pins: Any) -> Expect:
        plain = Expect(
            job="job", rank=rank, issuer_key=self.issuer.verifying_key.ed25519, clock=lambda: self.time[0],
            lineage="acme/train",
        )  # fmt: skip
        return evolve(plain, **pins)

    def pair(self, **both: Any) -> tuple[Handshake, Handshake]:
        """Initiator (rank 0) and responder (rank 1) of the peer profile."""
        return (
            Handshake(initiator=True, identity=self.attested(0), expect=self.expect(1), **both),
            Handshake(initiator=False, identity=self.attested(1), expect=self.expect(0), **both),
        )

    def client_pair(self, key: SigningKey | None = None, **both: Any) -> tuple[Handshake, Handshake]:
        holder = Holder(key or SigningKey.generate())
        return (
            Handshake(initiator=True, identity=holder, expect=self.expect(1), profile="client", **both),
            Handshake(initiator=False, identity=self.attested(1), expect=None, profile="client", **both),
        )


@pytest.fixture
def world() -> World:
    return World(SigningKey.generate(), [NOW])


def frames(core: Handshake, data: bytes) -> list[tuple[bytes, bytes]]:
    """Cut what one side sent into (header, body), as the other side would."""
    found = []
    while data:
        event, size = core.parse(data[:8])
        end = 8 + core.body_size(event, size)
        found.append((data[:8], data[8:end]))
        data = data[end:]
    return found


def run(
    initiator: Handshake, responder: Handshake, between: Callable[[int, bytes, bytes], Any] | None = None
) -> None:
    """Drive both to the end. ``between(number, header, body)`` answers what is delivered instead, as frames."""
    number = 0
    queue = [(responder, initiator, initiator.start())]
    while queue:
        target, source, data = queue.pop(0)
        while data:
            event, size = target.parse(data[:8])
            end = 8 + target.body_size(event, size)
            header, body, data = data[:8], data[8:end], data[end:]
            delivered = [(header, body)] if between is None else between(number, header, body)
            number += 1
            for head, content in delivered:
                kind, _ = target.parse(head)
                answer = target.step(kind, content)
                if answer:
                    queue.append((source, target, answer))


@pytest.fixture
def shake() -> Callable[..., None]:
    return run


@pytest.fixture
def together() -> Callable[[Callable[[], Any], Callable[[], Any]], tuple[Any, Any]]:
    """Run two functions at once; answer what each returned, or the exception it raised. Never longer than 20 s."""

    def both(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        found: list[Any] = [None, None]

        def one(place: int, work: Callable[[], Any]) -> None:
            try:
                found[place] = work()
            except BaseException as error:
                found[place] = error

        threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "hangs"
        return found[0], found[1]

    return both


@frozen
class Sides:
    """Two established endpoints without a transport: records are handed over by the test."""

    one: Endpoint
    other: Endpoint

    def records(self, data: bytes | memoryview) -> list[bytes]:
        """What ``one`` would send for this message."""
        return [bytes(record) for record in self.one.outgoing(flat(data))]

    def deliver(self, *records: bytes, target: Any = None) -> Any:
        """Give the bytes to ``other`` and read one message; None when it waits for more."""
        inbox = self.other._inbox
        data = b"".join(records)
        view = None if target is None else flat(target)
        while need := self.other.pull(view):
            if not data:
                return None
            space = inbox.space(need)
            count = min(len(space), len(data))
            space[:count] = data[:count]
            inbox.added(count)
            data = data[count:]
        # What is left is read ahead, as a socket would.
        while data:
            space = inbox.space(len(inbox) + len(data))
            count = min(len(space), len(data))
            space[:count] = data[:count]
            inbox.added(count)
            data = data[count:]
        return self.other.message


@pytest.fixture
def sides(world: World) -> Callable[..., Sides]:
    def make(pair: tuple[Handshake, Handshake] | None = None, **both: Any) -> Sides:
        one, other = pair or world.pair(**both)
        run(one, other)
        return Sides(Endpoint(one.session, Inbox()), Endpoint(other.session, Inbox()))

    return make
