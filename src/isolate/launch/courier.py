"""The courier: carries bytes between sockets, changes nothing unless told to, and can record all of it.

    >>> Route.parse("service=unix:/run/wire.sock>unix:/run/service.sock").name
    'service'

It is the operator's, and trusted with nothing but to be there. Recording and the one-byte fault are what an
operator could do anyway; the demo uses them to show what that is worth. Spec: docs/spec/service.md, section 8.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Self

from attrs import frozen

from isolate.errors import RefusedError, UsageError
from isolate.messages.http import Address, check_pin, parse_address, tls_context

CHUNK = 256 * 1024


@frozen
class Route:
    """Whoever connects to ``listen`` is connected to ``target``."""

    name: str
    listen: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``NAME=LISTEN>TARGET``. Raises UsageError."""
        name, equals, rest = text.partition("=")
        listen, arrow, target = rest.partition(">")
        if not (name and equals and arrow):
            raise UsageError(f"{text!r} is no route", hint="NAME=LISTEN>TARGET")
        parse_address(listen), Address.parse(target)
        return cls(name, listen, target)


class Courier:
    """Runs routes until cancelled. ``record``: a folder for NAME-<n>.up and .down, one pair a connection.

    What is recorded is what came in on that side, before any fault is put into it.
    """

    def __init__(self, routes: list[Route], record: Path | None) -> None:
        self.routes = routes
        self.record = record
        self.connections = {route.name: 0 for route in routes}
        self.flips: dict[tuple[str, int], int] = {}

    async def run(self) -> None:
        servers = [await self._listen(route) for route in self.routes]
        print("ready", flush=True)
        try:
            await asyncio.gather(*(server.serve_forever() for server in servers))
        finally:
            for server in servers:
                server.close()

    async def _listen(self, route: Route) -> asyncio.Server:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._carry(route, reader, writer)

        kind, host, port = parse_address(route.listen)
        if kind == "unix":
            return await asyncio.start_unix_server(accept, host, limit=CHUNK)
        return await asyncio.start_server(accept, host, port, limit=CHUNK)

    async def _carry(self, route: Route, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await _open(Address.parse(route.target))
        except (OSError, RefusedError) as error:
            if isinstance(error, RefusedError):
                print(f"{route.name}: {error.code}", file=sys.stderr, flush=True)
            writer.close()
            return
        # Counted once it is one: whoever comes before the listener is there is turned away, and tries again.
        number = self.connections[route.name]
        self.connections[route.name] += 1
        flip = self.flips.pop((route.name, number), None)
        stem = f"{route.name}-{number}"
        try:
            await asyncio.gather(
                self._pump(reader, far_writer, f"{stem}.up", flip),
                self._pump(far_reader, writer, f"{stem}.down", None),
            )
        finally:
            # Each end may have closed only its half.
            far_writer.close()
            writer.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, flip: int | None
    ) -> None:
        seen, record = 0, None
        try:
            record = (self.record / name).open("wb") if self.record else None
            while data := await reader.read(CHUNK):
                if record:
                    record.write(data)
                    record.flush()
                if flip is not None and seen <= flip < seen + len(data):
                    changed = bytearray(data)
                    changed[flip - seen] ^= 1
                    data = bytes(changed)
                seen += len(data)
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            # One side is gone: closing the other is all that is left to do.
            writer.close()
        finally:
            if record:
                record.close()

    async def obey(self) -> None:
        """Read commands from standard input, until it ends: ``count``, or ``flip NAME CONNECTION OFFSET``, which
        changes one bit of the byte at that offset of what the connecting side sends on that connection (from 0).
        """
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            match line.split():
                case ["flip", name, number, offset] if name in self.connections and _numbers(number, offset):
                    self.flips[name, int(number)] = int(offset)
                    print("armed", flush=True)
                case ["count"]:
                    print(json.dumps({"pid": os.getpid(), "connections": self.connections}), flush=True)
                case _:
                    print("unknown command", flush=True)


async def _open(target: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Raises OSError, and RefusedError when another server answers than a ``tls:`` address names."""
    if target.kind == "unix":
        return await asyncio.open_unix_connection(target.host, limit=CHUNK)
    if target.kind == "tcp":
        return await asyncio.open_connection(target.host, target.port, limit=CHUNK)
    reader, writer = await asyncio.open_connection(
        target.host, target.port, limit=CHUNK, ssl=tls_context(target), server_hostname=target.host
    )
    try:
        check_pin(target, writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    except RefusedError:
        writer.transport.abort()
        raise
    return reader, writer


def _numbers(*words: str) -> bool:
    return all(word.isascii() and word.isdecimal() and len(word) < 16 for word in words)


async def _main(routes: list[Route], record: Path | None) -> None:
    courier = Courier(routes, record)
    carrying = asyncio.create_task(courier.run())
    obeying = asyncio.create_task(courier.obey())
    await asyncio.wait({carrying, obeying}, return_when=asyncio.FIRST_COMPLETED)
    if carrying.done():
        print(f"the courier ended: {carrying.exception()}", file=sys.stderr, flush=True)
        # The thread that reads standard input would hold the end up until that ends too.
        os._exit(1)
    carrying.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="isolate-courier")
    parser.add_argument("--route", action="append", required=True, type=Route.parse)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    asyncio.run(_main(options.route, options.record))
