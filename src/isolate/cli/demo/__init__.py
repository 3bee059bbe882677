"""`isolate demo`: the whole story on real data, with what the operator saw."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click

from isolate.errors import MissingExtra


def command(name: str) -> click.Command:
    return demo


@click.command("demo")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
@click.option("--keep", type=click.Path(exists=False), help="Keep everybody's folders here, to look at.")
def demo(as_json: bool, keep: str | None) -> None:
    """Tell the whole story on real data, in under a minute.

    Seals handwritten digits and a network, trains it in two attested (simulated) enclaves over an encrypted
    channel, hands out a narrowed handle, refuses every thief, and searches all that the operator saw. Exits 0
    only when every expectation held.
    """
    try:
        import uvicorn  # noqa: F401  # the service that the demo starts needs it: say so before anything runs
    except ImportError:
        raise MissingExtra(
            "the demo runs the service", hint="pip install 'isolate-confidential[service]'"
        ) from None
    from isolate.cli.demo.story import Story
    from isolate.cli.demo.world import PREFIX, World

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        root = Path(keep) if keep else Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        with World(root) as world:
            story = Story(world, say=None if as_json else click.echo)
            story.tell()
    held = all(story.expectations.values())
    if as_json:
        body = {
            "held": held,
            "seconds": round(time.monotonic() - began, 1),
            "expectations": story.expectations,
            "details": story.details,
            "steps": story.steps,
            "not_stopped": list(story.NOT_STOPPED),
        }
        click.echo(json.dumps(body, indent=2))
    else:
        good = sum(story.expectations.values())
        click.echo(f"\n{good} of {len(story.expectations)} expectations held, in {time.monotonic() - began:.0f} s.")
        for name in [name for name, value in story.expectations.items() if not value]:
            click.echo(f"  did not hold: {name}: {story.details.get(name, '')}", err=True)
    if not held:
        sys.exit(1)
