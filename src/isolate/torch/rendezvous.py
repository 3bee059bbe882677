"""Where the ranks of a group listen: published in the store as hints, and believed by nobody.

    >>> from isolate.torch.rendezvous import Hint
    >>> hint = Hint("boot", ("unix:/run/c",), ("shm:/run/l", "tcp:10.0.0.1:7000"))
    >>> Hint.parse(hint.encode()) == hint
    True

The store of torch.distributed is plain and answers whatever its host likes. So nothing but addresses is taken from
it (docs/spec/process-group.md, 2); who answers there must prove to be the rank that is meant, inside the channel.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from attrs import frozen

from isolate.channel import Listener
from isolate.channel.streams import parse_address
from isolate.crypto import cbor
from isolate.errors import IsolateError, MalformedError, UsageError

MAX_HINT = 2048  # bytes
MAX_ADDRESSES = 8
TRANSPORTS = ("shm", "unix", "tcp")
_LOOK = 0.01  # seconds between two looks into the store


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


def boot() -> str:
    """Names this running kernel: ranks with another one share no memory with us."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


@frozen
class Hint:
    """Where one rank listens for control links and for links, best address first."""

    boot: str
    control: tuple[str, ...]
    link: tuple[str, ...]

    def encode(self) -> str:
        fields = {"boot": self.boot, "control": list(self.control), "link": list(self.link)}
        return cbor.encode(fields).hex()

    @classmethod
    def parse(cls, raw: str | bytes) -> Self:
        """Raises MalformedError for anything that is no hint."""
        try:
            text = bytes.fromhex(raw if isinstance(raw, str) else raw[: 2 * MAX_HINT + 1].decode("ascii"))
            fields = cbor.record(text, {"boot": str, "control": list, "link": list}, max_size=MAX_HINT)
        except ValueError:
            raise MalformedError("the store gives no address of a rank") from None
        for one in (fields["control"], fields["link"]):
            if len(one) > MAX_ADDRESSES or not all(isinstance(address, str) for address in one):
                raise MalformedError("the store gives no address of a rank")
            for address in one:
                try:
                    parse_address(address)
                except UsageError:
                    raise MalformedError("the store gives no address of a rank") from None
        return cls(fields["boot"], tuple(fields["control"]), tuple(fields["link"]))

    def reachable(self, addresses: tuple[str, ...], here: str) -> tuple[str, ...]:
        """Those of ``addresses`` that can be reached from a process under the kernel ``here``."""
        found = []
        for address in addresses:
            kind, where = parse_address(address)
            if kind == "tcp" or (self.boot == here and Path(where).exists()):
                found.append(address)
        return tuple(found)


def transports() -> tuple[str, ...]:
    """What ISOLATE_TRANSPORT allows: shm, unix or tcp alone, or (by default) all, the fastest first."""
    chosen = os.environ.get("ISOLATE_TRANSPORT", "auto")
    if chosen == "auto":
        return TRANSPORTS
    if chosen not in TRANSPORTS:
        raise UsageError(f"ISOLATE_TRANSPORT is auto, shm, unix or tcp, not {chosen[:20]}")
    return (chosen,)


def own_host() -> str:
    """The address of this host by which others reach it: ISOLATE_BIND, or that towards MASTER_ADDR."""
    if bound := os.environ.get("ISOLATE_BIND"):
        return bound
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        family, _, _, _, where = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the kernel only picks the route.
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


class Doors:
    """The listening addresses of one rank, in a folder of its own (below ISOLATE_LINKS, if that is set)."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="isolate-", dir=os.environ.get("ISOLATE_LINKS"))
        self.listeners: list[Listener] = []

    def open(self, name: str, listen: Callable[[str], Listener]) -> list[Listener]:
        """Listen by every transport that is to be had. ``listen`` opens an address. Raises what the last raised."""
        opened: list[Listener] = []
        failed: IsolateError | None = None
        for kind in transports():
            if kind == "tcp":
                host = own_host()
                address = f"tcp:[{host}]:0" if ":" in host else f"tcp:{host}:0"
            elif kind == "shm" and name == "control":
                # What is small and rare needs no shared memory.
                if "unix" in transports():
                    continue
                address = f"unix:{self._folder}/{name}"
            else:
                address = f"{kind}:{self._folder}/{name}-{kind}"
            try:
                opened.append(listen(address))
            except IsolateError as error:
                failed = error
        if not opened and failed is not None:
            raise failed
        self.listeners += opened
        return opened

    def close(self) -> None:
        for listener in self.listeners:
            with contextlib.suppress(OSError, IsolateError):
                listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def fetch(store: Store, rank: int, deadline: float, stop: Callable[[], None]) -> Hint | None:
    """The hint of a rank, or None when it published none in time. ``stop`` raises when there is no use any more.

    Raises MalformedError.
    """
    key, pause = f"hint/{rank}", _LOOK
    while not store.check([key]):
        stop()
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return Hint.parse(store.get(key))


def publish(store: Store, rank: int, hint: Hint) -> None:
    store.set(f"hint/{rank}", hint.encode())


def group_name(group: str, ranks: tuple[int, ...]) -> str:
    """What both ends of every channel of a group must agree on: its name and its members, in order."""
    members = hashlib.sha256(cbor.encode(list(ranks))).hexdigest()[:32]
    return f"torch/1/{members}/{hashlib.sha256(group.encode()).hexdigest()[:32]}"
