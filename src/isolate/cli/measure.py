"""`isolate measure APP`: the registers of an application, offline, for the owner's policy; and its operations.

>>> command("measure").name
'measure'
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from isolate.errors import RefusedError, UsageError
from isolate.launch.measure import measure

TIMEOUT = 60.0  # seconds for a file of operations to be run

# In a process of its own: what the file prints, and what it does to Python, stays out of ours.
_LIST = """
import contextlib, importlib.util, json, sys
folder, file = sys.argv[1:]
sys.path.insert(0, folder)
with contextlib.redirect_stdout(sys.stderr):
    spec = importlib.util.spec_from_file_location("operations_to_measure", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
from isolate.enclave.operations import Operation
found = {}
for value in vars(module).values():
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, Operation):
            found[one.name] = one.digest.hex()
print(json.dumps(found))
"""


def command(name: str) -> click.Command:
    """The command of that name."""
    return {"measure": measure_command}[name]


@click.command("measure")
@click.argument("application", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--operations", "file", metavar="FILE",
    help="RUN this file of APPLICATION, and print the digests of its operations instead.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def measure_command(application: str, file: str | None, as_json: bool) -> None:
    """Print the registers that the platform will measure for APPLICATION, a folder with an isolate.toml.

    Measuring reads files and runs nothing. With --operations, FILE is run, with your rights: a schema is what the
    code makes of it. Do that with your own applications only. Each line is NAME and DIGEST, which `isolate grant
    --operation NAME=DIGEST` takes.
    """
    if file is not None:
        found = operations(Path(application), file)
        click.echo(json.dumps(found, indent=2) if as_json else "\n".join(f"{n} {d}" for n, d in found.items()))
        return
    measured = measure(application)
    if as_json:
        click.echo(json.dumps({name: value.hex() for name, value in measured.registers.items()}, indent=2))
    else:
        click.echo("\n".join(measured.lines()))


def operations(application: Path, file: str) -> dict[str, str]:
    """Names and digests (hexadecimal) of the operations in a file of an application, which is RUN to learn them.

    Raises UsageError when there is no such file in it, RefusedError when it does not run or has none.
    """
    folder, path = application.resolve(), (application / file).resolve()
    if not path.is_file() or not path.is_relative_to(folder):
        raise UsageError(f"{application} has no file {file}")
    click.echo(f"isolate: running {path} with your rights, to learn its operations", err=True)
    command = [sys.executable, "-P", "-c", _LIST, str(folder), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        raise RefusedError(f"{file} did not come to its end", code="operations_unknown") from None
    if not found:
        last = done.stderr.strip().splitlines()[-1:] or ["no operation stands at its top level"]
        raise RefusedError(f"{file} names no operations: {last[0][:200]}", code="operations_unknown")
    return found
