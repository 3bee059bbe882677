"""`isolate launch APP`: have the platform measure and start an enclave, and show what it says in public."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click

from isolate.launch.supervisor import Host

_WAIT = 1  # seconds between two looks at what it printed


def command(name: str) -> click.Command:
    return launch


@click.command("launch")
@click.argument("application", type=click.Path(exists=True, file_okay=False))
@click.option("--service", required=True, metavar="ADDRESS", help="Where the attestation service is.")
@click.option("--platform", required=True, metavar="unix:PATH", help="Where the platform listens.")
@click.option("--name", "enclave", help="The enclave's name on this platform; the folder's, when not given.")
@click.option("--rank", default=0, show_default=True, type=click.IntRange(0, 65535))
@click.option("--assets", type=click.Path(file_okay=False), help="The folder of the sealed files.")
@click.option("--listen", metavar="ADDRESS", help="Where it listens for peers or clients.")
@click.option("--peer", metavar="ADDRESS", help="Where it finds its peer.")
@click.option("--logs", type=click.Path(file_okay=False, exists=True), help="Keep what it prints here.")
def launch(
    application: str, service: str, platform: str, enclave: str | None, rank: int, assets: str | None,
    listen: str | None, peer: str | None, logs: str | None,
) -> None:  # fmt: skip
    """Start APPLICATION (a folder with an isolate.toml) as an enclave, and print its public events until it ends.

    The simulated platform is a process of its own: python -m isolate.launch.platform --state DIR --listen
    unix:PATH. The exit status is the enclave's, or 1.
    """
    places = {"ISOLATE_SERVICE": service, "ISOLATE_RANK": str(rank), "ISOLATE_LISTEN": listen, "ISOLATE_PEER": peer}
    places["ISOLATE_ASSETS"] = None if assets is None else str(Path(assets).resolve())
    with tempfile.TemporaryDirectory() as folder:
        host = Host(platform, logs=Path(logs or folder))
        given = {name: value for name, value in places.items() if value is not None}
        started = host.launch(enclave or Path(application).resolve().name, Path(application), given)
        click.echo(json.dumps({"event": "launched", "pid": started.pid}), err=True)
        shown, status = 0, None
        try:
            while status is None:
                status = started.wait(_WAIT)
                events = started.events()
                for event in events[shown:]:
                    click.echo(json.dumps(event))
                shown = len(events)
        except KeyboardInterrupt:
            started.kill()
            raise
    sys.exit(0 if status == 0 else 1)
