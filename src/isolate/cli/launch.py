"""`isolate launch APP`: have the platform measure and start an enclave, and show what it says in public."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import click

from isolate.cli.signals import end_once
from isolate.errors import UsageError
from isolate.launch import torchrun
from isolate.launch.supervisor import Enclave, Held, Host

_WAIT = 0.2  # seconds between two looks at what it printed
_MAX_RANK = 65535


def command(name: str) -> click.Command:
    return launch


@click.command("launch")
@click.argument("application", type=click.Path(exists=True, file_okay=False))
@click.option("--service", required=True, metavar="ADDRESS", help="Where the attestation service is.")
@click.option("--platform", required=True, metavar="unix:PATH", help="Where the platform listens.")
@click.option("--name", "enclave", help="The enclave's name on this platform; the folder's, when not given.")
@click.option("--rank", type=click.IntRange(0, _MAX_RANK), help="Which rank it asks for; torchrun's, or 0.")
@click.option("--assets", type=click.Path(file_okay=False), help="The folder of the sealed files.")
@click.option("--listen", metavar="ADDRESS", help="Where it listens for peers or clients.")
@click.option("--peer", metavar="ADDRESS", help="Where it finds its peer.")
@click.option("--logs", type=click.Path(file_okay=False, exists=True), help="Keep what it prints here.")
def launch(
    application: str, service: str, platform: str, enclave: str | None, rank: int | None, assets: str | None,
    listen: str | None, peer: str | None, logs: str | None,
) -> None:  # fmt: skip
    """Start APPLICATION (a folder with an isolate.toml) as an enclave, and print its public events until it ends.

    The simulated platform is a process of its own: python -m isolate.launch.platform --state DIR --listen
    unix:PATH. The enclave ends with this command. The exit status is the enclave's, or 128 and the signal's number.

    Under torchrun --no-python each worker is an enclave of its own: its rank, and where it finds the others, come
    from torchrun. docs/training.md.
    """
    told = torchrun.places(os.environ)
    places = {"ISOLATE_SERVICE": service, "ISOLATE_LISTEN": listen, "ISOLATE_PEER": peer}
    places["ISOLATE_ASSETS"] = None if assets is None else str(Path(assets).resolve())
    number = _rank(told) if rank is None else rank
    given = told | {name: value for name, value in places.items() if value is not None}
    given["ISOLATE_RANK"] = str(number)
    folder = Path(application).resolve().name
    name = enclave or (torchrun.enclave_name(folder, number) if told else folder)
    # What torchrun sends, or a shell that goes away: this command ends in order, and its enclave with it.
    end_once(signal.SIGTERM, signal.SIGHUP, status=lambda number: 128 + number)
    with contextlib.ExitStack() as undo:
        host = Host(platform, logs=Path(logs or undo.enter_context(tempfile.TemporaryDirectory())))
        held = undo.enter_context(host.hold(name, Path(application), given))
        event = {"event": "launched", "pid": held.enclave.pid, "milliseconds": held.enclave.milliseconds}
        click.echo(json.dumps(event), err=True)
        status = _show(held)
    sys.exit(status if status >= 0 else 128 - status)


def _rank(told: dict[str, str]) -> int:
    text = told.get("ISOLATE_RANK", "0")
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and int(text) <= _MAX_RANK):
        raise UsageError("RANK in the environment is no rank")
    return int(text)


def _show(held: Held) -> int:
    """Print its events as they come; answer its status (a signal's number is negative)."""
    with (held.enclave.logs / f"{held.enclave.name}.out").open(encoding="utf-8", errors="replace") as out:
        begun = ""

        def show() -> None:
            nonlocal begun
            *lines, begun = (begun + out.read()).split("\n")
            for event in Enclave.parse_events("\n".join(lines)):
                click.echo(json.dumps(event))

        try:
            while (status := held.wait(_WAIT)) is None:
                show()
        finally:
            # Whatever ends this: why it ended is most often said last.
            show()
        return status
