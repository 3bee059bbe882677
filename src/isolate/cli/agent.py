"""`isolate agent`: a process that holds a holder's key, and signs for programs of the same user.

>>> command("agent").name
'agent'
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

import click

from isolate.cli.signals import end_once, ignore
from isolate.client.agent import PURPOSES, Agent, AgentServer
from isolate.crypto.signing import MAX_KEY_FILE, Purpose, SigningKey
from isolate.enclave import boot
from isolate.errors import ControlMissing, KeyFormatError, UsageError


@click.command("agent")
@click.option(
    "-i", "--identity", "key_file", required=True, metavar="F", help="The holder's key file; - is standard input."
)
@click.option("--listen", "address", metavar="unix:PATH", help="[default: isolate-agent in $XDG_RUNTIME_DIR]")
@click.option("--no-delegation", is_flag=True, help="Invoke and ask for budgets, but pass no handle on.")
def agent(key_file: str, address: str | None, no_delegation: bool) -> None:
    """Hold a key, and sign with it what a holder signs, for programs of this user. `--signer unix:PATH` uses it.

    The key is read after this process was made unreadable for others (no core, no tracing, no /proc/PID/mem); root
    reads it all the same. It ends with a signal, or with whoever started it.
    """
    if address is None:
        if not os.environ.get("XDG_RUNTIME_DIR"):
            raise UsageError("where to listen?", hint="--listen unix:/path")
        address = f"unix:{os.environ['XDG_RUNTIME_DIR']}/isolate-agent"
    boot.harden()
    if not all(boot.capabilities().values()):
        raise ControlMissing("this process could not be hardened, or is traced")
    # As an enclave starts (isolate.enclave.boot): a descriptor on this process's memory that was opened before the
    # line above still reads it, so the key is read in a child, whose memory never was readable.
    alive, ours = os.pipe()
    child = os.fork()
    if child:
        os.close(alive)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
        # Looked at, not yet reaped: until it is, its number is nobody else's, and that signal goes nowhere else.
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        ignore(signal.SIGTERM)
        sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0))
    os.close(ours)
    end_once(signal.SIGTERM)
    key = _load(key_file)
    key.forget_seed()
    purposes = PURPOSES - {Purpose.BLOCK} if no_delegation else PURPOSES
    with contextlib.closing(AgentServer(Agent(key, purposes=purposes), address)) as server:
        threading.Thread(target=server.run, daemon=True).start()
        click.echo(f"agent at {server.address} for {key.verifying_key}")
        with contextlib.suppress(KeyboardInterrupt):
            # The end of the pipe: the process above is gone.
            os.read(alive, 1)


def _load(path: str) -> SigningKey:
    if path != "-":
        return SigningKey.load(path)
    lines: list[Any] = sys.stdin.buffer.read(MAX_KEY_FILE).decode("ascii", "replace").splitlines()
    keys = [line for line in lines if line.strip() and not line.startswith("#")]
    if len(keys) != 1:
        raise KeyFormatError("standard input holds no signing key")
    return SigningKey.parse(keys[0])


def command(name: str) -> click.Command:
    """The command of that name."""
    return {"agent": agent}[name]
