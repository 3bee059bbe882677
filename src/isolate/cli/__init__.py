"""Floor 7: the command line. Exit status 0 is done, 1 refused, 2 used wrongly; an error is one line.

>>> from click.testing import CliRunner
>>> CliRunner().invoke(cli, ["--version"]).output.startswith("isolate ")
True
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import click

from isolate import __version__
from isolate.errors import IsolateError, UsageError

# Command -> module of this package that defines it. Loaded when used: `isolate keygen` loads no server.
COMMANDS = {
    "agent": "isolate.cli.agent",
    "approve": "isolate.cli.approve",
    "approvers": "isolate.cli.approve",
    "delegate": "isolate.cli.handles",
    "export": "isolate.cli.approve",
    "grant": "isolate.cli.handles",
    "handle": "isolate.cli.handles",
    "invoke": "isolate.cli.handles",
    "revoke": "isolate.cli.handles",
    "log": "isolate.cli.log",
    "launch": "isolate.cli.launch",
    "measure": "isolate.cli.measure",
    "serve": "isolate.cli.serve",
    "inspect": "isolate.cli.sealed",
    "keygen": "isolate.cli.keys",
    "rewrap": "isolate.cli.sealed",
    "seal": "isolate.cli.sealed",
    "unseal": "isolate.cli.sealed",
    "bench": "isolate.cli.bench",
    "verify": "isolate.cli.verify",
    "owner": "isolate.cli.owner",
    "rollback": "isolate.cli.owner",
    "explain": "isolate.cli.owner",
    "demo": "isolate.cli.demo",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[name]).command(name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="isolate", message="%(prog)s %(version)s")
def cli() -> None:
    """Keep AI data away from everyone who does not need it, on machines somebody else runs."""


def report(error: IsolateError, *, as_json: bool = False) -> int:
    """Print one line on standard error (or one JSON object) and answer the exit status."""
    status = 2 if isinstance(error, UsageError) else 1
    if as_json:
        body: dict[str, Any] = {"error": error.code, "message": error.message, "hint": error.hint}
        if error.request_id:
            body["request_id"] = error.request_id
        click.echo(json.dumps(body), err=True)
    else:
        click.echo(f"isolate: {error.code}: {' '.join(str(error).split())}", err=True)
    return status


def main(arguments: list[str] | None = None) -> None:
    """The entry point of the `isolate` command."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(args=words, prog_name="isolate", standalone_mode=False)
    except IsolateError as error:
        sys.exit(report(error, as_json="--json" in words))
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("isolate: stopped", err=True)
        sys.exit(130)
