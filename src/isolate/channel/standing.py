"""Whether the attestation of the other end still stands, while the session lives (docs/spec/channel.md, 7).

    >>> from isolate.channel.standing import SHOW_EVERY
    >>> SHOW_EVERY
    30.0

A result token lives five minutes; a session may live for days. So each end shows its newest token again (an ATTEST
record, signed over the session and the record's number), refuses a peer whose token ran out longer ago than
``Expect.max_stale``, and asks ``Expect.recheck`` now and then, which raises once the measurement is revoked.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable

from attrs import evolve

from isolate.channel.peers import (
    Attested,
    AttestedPeer,
    Expect,
    Holder,
    HolderPeer,
    Statement,
    show,
    verify_attested,
)
from isolate.errors import HandshakeRefused, IsolateError

SHOW_EVERY = 30.0  # seconds between looking for a newer token of our own

_OTHER = {"initiator": "responder", "responder": "initiator"}


class Standing:
    """What one end knows about how long the session may go on.

    ``shown`` is the token that the handshake showed, ``clock`` counts seconds from anywhere.
    """

    def __init__(
        self,
        peer: AttestedPeer | HolderPeer,
        *,
        identity: Attested | Holder,
        expect: Expect | None,
        statement: Statement,
        shown: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.peer = peer
        self._identity, self._expect, self._statement, self.clock = identity, expect, statement, clock
        self._shown = shown
        # Only a token that is asked for can be a newer one.
        self.renews = isinstance(identity, Attested) and not isinstance(identity.token, str)
        self._next_show = clock() + SHOW_EVERY if self.renews else math.inf
        self._watches = isinstance(peer, AttestedPeer) and expect is not None
        self._next_look = -math.inf if self._watches else math.inf
        # The time of the next thing to do: what a busy channel compares with, and nothing more.
        self.due = self._next_look

    def look(self) -> None:
        """Raise HandshakeRefused when the peer's attestation stands no longer. It looks only when it is time."""
        now, expect, peer = self.clock(), self._expect, self.peer
        if now < self._next_look or expect is None or not isinstance(peer, AttestedPeer):
            return
        self._next_look = now + expect.recheck_every
        self.due = min(self._next_look, self._next_show)
        if expect.max_stale is not None and expect.clock() > peer.result.expires + expect.max_stale:
            raise HandshakeRefused("the peer's attestation ran out and was not renewed", code="attestation_stale")
        if expect.recheck is not None:
            try:
                expect.recheck(peer)
            except IsolateError as error:
                raise HandshakeRefused(
                    f"the peer is no longer admitted: {error.message}", code=error.code
                ) from None

    def again(self, number: int, *, now: bool = False) -> bytes | None:
        """The body of an ATTEST record with this number, when there is a newer token to show (or ``now``)."""
        if not now:
            if not self.renews or self.clock() < self._next_show:
                return None
            self._next_show = self.clock() + SHOW_EVERY
            self.due = min(self._next_look, self._next_show)
        if not isinstance(self._identity, Attested):
            return None
        token = self._identity.current()
        if token == self._shown and not now:
            return None
        self._shown = token
        return show(self._identity, self._numbered(self._statement.role, number))

    def renew(self, body: bytes, number: int) -> None:
        """Take the peer's ATTEST. Raises HandshakeRefused; it must be the same instance as before."""
        old, expect = self.peer, self._expect
        if not isinstance(old, AttestedPeer) or expect is None:
            raise HandshakeRefused("this peer is not attested, and shows an attestation", code="out_of_order")
        statement = self._numbered(_OTHER[self._statement.role], number)
        new = verify_attested(body, statement, expect, old.static, fresh=False)
        if new.result.instance != old.result.instance:
            raise HandshakeRefused("another instance speaks for the peer", code="wrong_instance")
        self.peer = new

    def _numbered(self, role: str, number: int) -> Statement:
        again = b"isolate/v1/channel/again\0" + number.to_bytes(8, "big")
        return evolve(self._statement, role=role, before=hashlib.sha256(again).digest())
