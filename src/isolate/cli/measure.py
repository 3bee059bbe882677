"""`isolate measure APP`: the registers of an application, offline, for the owner's policy."""

from __future__ import annotations

import json

import click

from isolate.launch.measure import measure


def command(name: str) -> click.Command:
    return measure_command


@click.command("measure")
@click.argument("application", type=click.Path(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def measure_command(application: str, as_json: bool) -> None:
    """Print the registers that the platform will measure for APPLICATION, a folder with an isolate.toml."""
    found = measure(application)
    if as_json:
        click.echo(json.dumps({name: value.hex() for name, value in found.registers.items()}, indent=2))
    else:
        click.echo("\n".join(found.lines()))
