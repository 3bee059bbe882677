"""Random lives of handles at a service with two enclaves: grant, delegate, use, revoke, expire, crash, restore.

A model of a few lines, which knows nothing of the service's tables, says before each use whether it must be let
through. Whatever was done: a scope only shrinks, no account goes above its ceiling or below zero, no more is
answered than was charged, and nothing leaves after a revocation: under a lease, a minute after it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import define, field
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from isolate.capability.invocation import Invocation, ReplayGuard, hash_arguments
from isolate.capability.scope import Scope, meet
from isolate.capability.token import Token
from isolate.crypto import cbor
from isolate.crypto.signing import SigningKey
from isolate.enclave.operations import Label, operation
from isolate.enclave.runtime import Server
from isolate.errors import LogRefused
from isolate.messages.invoke import Invoke, Reply, ReserveRequest
from isolate.messages.limits import AssetLimits
from isolate.messages.owner import Revoke
from isolate.service.head import Head

KEYS = [SigningKey.generate() for _ in range(3)]  # few, so that they meet again
SIZES = st.sampled_from([0, 100, 256, 300])
STALE = 60  # seconds that a revocation may go unnoticed under a lease
BINDING = b"b" * 32
MEANWHILE: list[Callable[[], None]] = []  # what happens while an operation runs


@operation(inputs={}, output=Label(10))
def busy(view: Any) -> int:
    while MEANWHILE:
        MEANWHILE.pop()()
    return 7


# Roomy enough that most uses get through, and tight enough that some do not.
limits = st.fixed_dictionaries(
    {},
    optional={
        "uses": st.integers(1, 6),
        "bytes_out": st.integers(200, 2000),
        "rates": st.dictionaries(st.sampled_from([10, 40]), st.integers(1, 3), min_size=1),
        "expires": st.integers(20, 200),  # from now on
        "lease": st.sampled_from([0, 1, 2, 3]),
    },
)
# For leases: not always allowed by the grant, and seldom used up at once.
lending = st.fixed_dictionaries(
    {"lease": st.sampled_from([None, 2, 3, 4, 4])},
    optional={
        "uses": st.integers(4, 20),
        "bytes_out": st.integers(1500, 6000),
        "rates": st.dictionaries(st.sampled_from([10, 40]), st.integers(4, 9), min_size=1),
        "expires": st.integers(20, 90),
    },
)
# What happens before a use, through which handle it is, in which enclave, and what happens while it runs.
before = st.sampled_from([*[None] * 12, "wait", "wait", "minute", "revoke", "service", "enclave"])
during = st.sampled_from(
    [None, None, None, None, "wait", "minute", "minute", "expire", "expire", "revoke", "use", "service", "enclave"]
)
steps = st.lists(
    st.tuples(before, st.sampled_from([0, 1, 1]), st.sampled_from([0, 0, 1]), during), min_size=6, max_size=14
)


@define(eq=False)
class Held:
    """A handle as the model sees it: what each prefix of its chain was given, in so many words."""

    token: Token
    key: SigningKey
    chain: list[Held] = field(factory=list)  # from the grant to this one
    scope: Scope = field(factory=Scope)  # effective
    revoked: int | None = None  # when

    @property
    def lease(self) -> int:
        """Uses in one lease: what is narrowed from a grant that has it only lowers it."""
        return 0 if self.chain[0].scope.lease is None else self.scope.lease or 0

    def accounts(self, caps: AssetLimits) -> Iterator[tuple[Any, int | None, int | None, Any]]:
        """Each account with its ceilings: uses, bytes, rates."""
        for one in self.chain:
            yield one, one.scope.uses, one.scope.bytes_out, one.scope.rates
        seen: set[bytes] = set()
        for one in self.chain:
            public = one.key.verifying_key.ed25519
            if public not in seen:
                seen.add(public)
                yield public, caps.holder_uses, caps.holder_bytes, one.scope.rates
        yield "asset", caps.uses, caps.bytes_out, None


@define(eq=False)
class Open:
    """A use that was reserved, and by whom."""

    held: Held
    request: ReserveRequest
    number: bytes
    till: Any
    reserved: int
    began: int
    settled: bool = False


@define(eq=False)
class Leased:
    """What one enclave has of one handle: uses that are left until then, or (with none) when it may ask again."""

    left: int
    until: int
    waiting: bool = False


class Life(RuleBasedStateMachine):
    """The rules; ``make`` answers a fresh realm and its two tills."""

    handles = Bundle("handles")
    uses = Bundle("uses")

    def __init__(self, make: Callable[[], tuple[Any, list[Any]]]) -> None:
        super().__init__()
        self.realm, self.tills = make()
        self.servers: dict[int, Server] = {}
        self.leases: dict[int, dict[Held, Leased]] = {}
        self.caps = AssetLimits("a/b", None, None, None, None)
        self.count: dict[Any, int] = defaultdict(int)
        self.out: dict[Any, int] = defaultdict(int)
        self.times: dict[Any, list[int]] = defaultdict(list)
        self.held: list[Held] = []
        self.left_the_enclave = 0
        self.answered: dict[Any, list[int]] = defaultdict(list)  # when it began, for each account
        for rank in range(2):
            self._booted(rank)
        self.copy: tuple[Path, str] | None = None

    def _booted(self, rank: int) -> None:
        self.servers[rank] = Server(self.tills[rank].enclave, "a/b", {"w": np.zeros(1)}, [busy])
        self.leases[rank] = {}

    # What happens

    @initialize(target=handles, key=st.sampled_from(KEYS), given=limits)
    def first(self, key: SigningKey, given: dict[str, Any]) -> Held:
        return self._granted(key, given)

    @rule(target=handles, key=st.sampled_from(KEYS), given=limits)
    def grant(self, key: SigningKey, given: dict[str, Any]) -> Held:
        return self._granted(key, given)

    def _granted(self, key: SigningKey, given: dict[str, Any]) -> Held:
        operations = {"op": b"d" * 32, busy.name: busy.digest}
        token = self.realm.grant(key, operations=operations, **self._dated(given))
        return self._kept(Held(token, key, [], token.scope))

    @rule(target=handles, parent=handles, key=st.sampled_from(KEYS), given=limits)
    def delegate(self, parent: Held, key: SigningKey, given: dict[str, Any]) -> Held:
        if len(parent.chain) == 4:
            return parent
        asked = Scope(**self._dated(given))
        token = parent.token.attenuate(parent.key, asked, key.verifying_key.ed25519)
        assert token.scope.is_within(parent.token.scope)  # a scope only shrinks
        return self._kept(Held(token, key, list(parent.chain), meet(parent.scope, asked)))

    def _dated(self, given: dict[str, Any]) -> dict[str, Any]:
        return given | ({"expires": self.realm.state.clock() + given["expires"]} if "expires" in given else {})

    def _kept(self, held: Held) -> Held:
        held.chain.append(held)
        self.held.append(held)
        return held

    @rule(target=uses, held=handles, till=st.integers(0, 1), size=SIZES)
    def reserve(self, held: Held, till: int, size: int) -> Any:
        request = self.realm.use(held.token, held.key, bytes_out=size)
        code = self.realm.code(lambda: self.tills[till].reserve(request))
        assert (code == "") == self._admitted(held, size), code
        if code:
            return multiple()
        self._charge(held, size)
        return Open(
            held, request, Invocation.parse(request.invocation).id, self.tills[till], size, self.realm.state.clock()
        )

    def _admitted(self, held: Held, size: int, uses: int = 1) -> bool:
        if not self._alive(held):
            return False
        now = self.realm.state.clock()
        for account, most, most_out, rates in held.accounts(self.caps):
            if most is not None and self.count[account] + uses > most:
                return False
            if most_out is not None and self.out[account] + uses * size > most_out:
                return False
            for seconds, in_window in (rates or {}).items():
                if sum(now - seconds < one for one in self.times[account]) + uses > in_window:
                    return False
        return True

    def _charge(self, held: Held, size: int, uses: int = 1) -> None:
        for account, *_ in held.accounts(self.caps):
            self.count[account] += uses
            self.out[account] += uses * size
            self.times[account] += [self.realm.state.clock()] * uses

    def _alive(self, held: Held) -> bool:
        expires = held.scope.expires
        in_time = expires is None or self.realm.state.clock() < expires
        return in_time and not any(one.revoked is not None for one in held.chain)

    @rule(use=uses, till=st.sampled_from([None, None, 0, 1]), size=SIZES)
    def settle(self, use: Open, till: int | None, size: int) -> None:
        by = use.till if till is None else self.tills[till]
        code = self.realm.code(lambda: by.settle(use.number, size))
        # An enclave that was restarted is another instance; its own till is out of its slot.
        mine = by is use.till and by in self.tills
        allowed = mine and not use.settled and size <= use.reserved and self._alive(use.held)
        assert (code == "") == allowed, code
        if code == "":
            use.settled = True
            self._left(use.held, size, use.began)
            for account, *_ in use.held.accounts(self.caps):
                self.out[account] -= use.reserved - size

    @rule(held=handles, till=st.integers(0, 1), sizes=st.lists(SIZES, min_size=1, max_size=4))
    def use(self, held: Held, till: int, sizes: list[int]) -> None:
        """A few uses from beginning to end."""
        for size in sizes:
            opened = self.reserve(held, till, 300)
            if isinstance(opened, Open):
                self.settle(opened, None, size)

    @rule(target=uses, held=handles, till=st.integers(0, 1), seconds=st.integers(1, 60), data=st.data())
    def a_long_operation(self, held: Held, till: int, seconds: int, data: st.DataObject) -> Any:
        """Something happens between reserve and settle."""
        opened = self.reserve(held, till, 300)
        if not isinstance(opened, Open):
            return multiple()
        what: dict[str, Callable[[], None]] = {
            "wait": lambda: self.wait(seconds),
            "expire": lambda: self.wait(max(1, (held.scope.expires or 0) - self.realm.state.clock())),
            "crash of the service": self.crash_of_the_service,
            "crash of the enclave": lambda: self.crash_of_an_enclave(till),
            "another use": lambda: self.use(held, 1 - till, [256]),
            "revoke": lambda: self.revoke(data.draw(st.sampled_from(held.chain))),
        }
        what[data.draw(st.sampled_from(list(what)))]()
        self.settle(opened, None, data.draw(SIZES))
        return opened

    @initialize(given=st.tuples(lending, lending), steps=steps, data=st.data())
    def first_lease(self, given: Any, steps: Any, data: st.DataObject) -> None:
        self.lend(given, steps, data)

    @rule(target=handles, given=st.tuples(lending, lending), steps=steps, data=st.data())
    def lend(self, given: Any, steps: Any, data: st.DataObject) -> Any:
        """A grant that may allow leases and a handle narrowed from it, and what becomes of both."""
        held = self._granted(KEYS[0], given[0])
        other = self.delegate(held, KEYS[1], given[1])
        self._invoked((held, other), steps, data)
        return multiple(held, other)

    @rule(held=handles, other=handles, steps=steps, data=st.data())
    def invoke(self, held: Held, other: Held, steps: Any, data: st.DataObject) -> None:
        self._invoked((held, other), steps, data)

    def _invoked(self, pair: tuple[Held, Held], steps: Any, data: st.DataObject) -> None:
        """Invocations in the enclaves themselves; things happen before them, and while they run."""
        ended, seconds = data.draw(st.sampled_from(pair[1].chain)), data.draw(st.sampled_from([1, 10, 59]))
        for earlier, which, rank, meanwhile in steps:
            held, left = pair[which], (pair[which].scope.expires or 0) - self.realm.state.clock()
            what: dict[str | None, Callable[[], None]] = {
                None: lambda: None, "wait": lambda: self.wait(seconds), "minute": lambda: self.wait(STALE),
                "expire": lambda left=left: self.wait(max(1, left)), "revoke": lambda: self.revoke(ended),
                "use": lambda held=held, rank=rank: self._invoke(held, rank), "service": self.crash_of_the_service,
                # While it runs: then the old one goes on, as a twin.
                "enclave": lambda rank=rank: self.crash_of_an_enclave(rank),
            }  # fmt: skip
            what[earlier]()
            self._invoke(held, rank, what[meanwhile])
            leased = any(one in mine for one in pair for mine in self.leases.values())
            if not leased and not any(map(self._alive, pair)):
                return  # refused from now on, over and over

    def _invoke(self, held: Held, rank: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        size, server, began = busy.reply_size, self.servers[rank], self.realm.state.clock()
        paid, leased = self._paid(held, rank, size)
        failures = list[Exception]()

        def during() -> None:
            try:
                meanwhile()
            except Exception as error:
                failures.append(error)  # the enclave would tell nobody

        MEANWHILE[:] = [during]
        code = self._answer(held, server)
        assert not failures, failures
        assert (MEANWHILE == []) is paid, code  # nothing ran that was not paid for
        good = leased is not None and self.realm.state.clock() < leased
        leaves = good or (paid and self._alive(held) and server is self.servers[rank])
        if leaves and leased is not None and not good:
            # The lease ended meanwhile: the use is paid for once more, as any other.
            leaves = self._admitted(held, size)
            if leaves:
                self._charge(held, size)
        assert (code == "") == leaves, code
        if leaves:
            self._left(held, size, began, STALE if good else 0)

    def _paid(self, held: Held, rank: int, size: int) -> tuple[bool, int | None]:
        """Whether a use that begins now is paid for; and the end of the lease that it is spent from, if it is."""
        now, mine, expires = self.realm.state.clock(), self.leases[rank], held.scope.expires
        if held.lease > 1 and (expires is None or now < expires):
            one = mine.get(held)
            good = one is not None and now < one.until
            if one is not None and good and one.left:
                one.left -= 1
                return True, one.until
            if self._alive(held) and not (one is not None and good and one.waiting):
                if self._admitted(held, size, held.lease):
                    self._charge(held, size, held.lease)
                    mine[held] = Leased(held.lease - 1, min(now + STALE, expires or now + STALE))
                    return True, None
                mine[held] = Leased(0, now + STALE, waiting=True)
        if self._admitted(held, size):
            self._charge(held, size)
            return True, None
        return False, None

    @staticmethod
    def _answer(held: Held, server: Server) -> str:
        """The code of the enclave's reply."""
        invocation = Invocation.sign(
            held.token, held.key, operation=busy.name, operation_digest=busy.digest,
            argument_hash=hash_arguments(cbor.encode({})), channel_binding=BINDING,
            nonce=secrets.token_bytes(16), counter=1,
        )  # fmt: skip
        message = Invoke(held.token.encode(), invocation.encode(), {}).padded()
        return Reply.parse(server.answer(message, BINDING, ReplayGuard(BINDING))).code

    def _left(self, held: Held, size: int, began: int, stale: int = 0) -> None:
        """A reply left: what must be true then, in so many words, whatever was expected."""
        now = self.realm.state.clock()
        assert held.scope.expires is None or now < held.scope.expires
        assert all(one.revoked is None or now < one.revoked + stale for one in held.chain)
        self.left_the_enclave += size
        for account, _, _, rates in held.accounts(self.caps):
            self.answered[account].append(began)
            assert len(self.answered[account]) <= self.count[account]
            for seconds in rates or ():
                ran = sum(began - seconds < then <= began for then in self.answered[account])
                assert ran <= sum(began - seconds - STALE < then <= began for then in self.times[account])

    @rule(use=uses, till=st.integers(0, 1))
    def replay(self, use: Open, till: int) -> None:
        assert self.realm.code(lambda: self.tills[till].reserve(use.request)) != ""
        if use.settled:
            assert self.realm.code(lambda: use.till.settle(use.number, 0)) != ""

    @rule(held=handles)
    def revoke(self, held: Held) -> None:
        self.realm.tell("revoke", Revoke(held.token.id))
        if held.revoked is None:
            held.revoked = self.realm.state.clock()

    @rule(caps=st.tuples(*[st.none() | st.integers(2, 12), st.none() | st.integers(500, 3000)] * 2))
    def limit(self, caps: tuple[int | None, int | None, int | None, int | None]) -> None:
        self.caps = AssetLimits("a/b", *caps)
        self.realm.tell("limits", self.caps)

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.realm.clock.now += seconds

    @rule(held=handles, seconds=st.integers(1, 100))
    def set_the_clock_back(self, held: Held, seconds: int) -> None:
        admitted = self._admitted(held, 1)
        self.realm.clock.now -= seconds
        # Only refusals are tried: what must be let through is tried by ``reserve``.
        if not admitted:
            assert self.realm.code(lambda: self.tills[0].reserve(self.realm.use(held.token, held.key, bytes_out=1)))
        self.realm.clock.now += seconds

    @rule()
    def crash_of_the_service(self) -> None:
        self.realm.reopen()

    @rule(rank=st.integers(0, 1))
    def crash_of_an_enclave(self, rank: int) -> None:
        self.tills[rank] = type(self.tills[rank])(self.realm, self.realm.enclave(rank=rank))
        self._booted(rank)

    @rule()
    def keep_a_copy(self) -> None:
        if self.copy is None:
            self.realm.state.close()
            path = Path(shutil.copytree(self.realm.folder / "state", self.realm.folder / "copy"))
            self.realm.open()
            self.copy = path, self.realm.service.log.checkpoint()

    @rule()
    def restore_the_copy(self) -> None:
        """A service that is started with a kept checkpoint refuses every copy that is behind it."""
        if self.copy is None or self.realm.service.log.checkpoint() == self.copy[1]:
            return
        state, head = self.realm.folder / "state", self.realm.folder / "head"
        head.write_text(self.realm.service.log.checkpoint(), encoding="utf-8")
        self.realm.state.close()
        state.rename(self.realm.folder / "newer")
        self.copy[0].rename(state)
        self.realm.open()
        with pytest.raises(LogRefused):
            Head(self.realm.state, self.realm.service.log, head)
        self.realm.state.close()
        state.rename(self.copy[0])
        (self.realm.folder / "newer").rename(state)
        self.realm.open()

    # What always holds

    @invariant()
    def the_service_says_what_the_model_says(self) -> None:
        for held in self.held[-3:]:
            if not self._alive(held):
                assert self.realm.code(lambda held=held: self.tills[0].left(held.token, held.key)) != ""
                continue
            left = self.tills[0].left(held.token, held.key)
            uses = [most - self.count[one] for one, most, _, _ in held.accounts(self.caps) if most is not None]
            out = [most - self.out[one] for one, _, most, _ in held.accounts(self.caps) if most is not None]
            assert left.uses == (max(0, min(uses)) if uses else None)
            assert left.bytes_out == (max(0, min(out)) if out else None)

    @invariant()
    def no_account_is_above_its_ceiling_or_below_zero(self) -> None:
        with self.realm.state.transaction() as database:
            rows = database.execute("SELECT account, uses, bytes_out FROM account").fetchall()
        spent = {bytes(account): (uses, out) for account, uses, out in rows}
        for held in self.held:
            uses, out = spent.get(held.token.id, (0, 0))
            assert 0 <= uses <= (held.scope.uses if held.scope.uses is not None else uses)
            assert 0 <= out <= (held.scope.bytes_out if held.scope.bytes_out is not None else out)
        assert self.left_the_enclave <= self.out["asset"]

    def teardown(self) -> None:
        with contextlib.suppress(Exception):
            self.realm.state.close()


def live(realms: Callable[..., Any], tills: Any, examples: int, steps: int) -> None:
    def make() -> tuple[Any, list[Any]]:
        realm = realms()
        realm.asset()
        return realm, [tills(realm, realm.enclave(rank=rank)) for rank in range(2)]

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: Life(make),
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize="CI" in os.environ
        ),
    )


@pytest.mark.threat("BUD-9")
def test_a_few_lives(realms: Callable[..., Any], till_type: Any) -> None:
    live(realms, till_type, 3, 20)


@pytest.mark.slow
@pytest.mark.threat("BUD-9")
def test_many_lives(realms: Callable[..., Any], till_type: Any) -> None:
    live(realms, till_type, 30, 50)
