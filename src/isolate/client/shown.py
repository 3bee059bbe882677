"""How a handle shows itself: its scope, and about how much of its budget is left.

    >>> share(80, 100), share(3, 100), share(0, 100), share(100, 100)
    ('about 80 %', 'under 10 %', 'none', 'all')
    >>> age(59), age(200), age(7300)
    ('just now', '3 min ago', '2 h ago')

What stands in a notebook is saved, shared and logged. So the budget is shown in tenths, and only what was asked of
the service before, with its age: showing a handle asks nobody anything. Names are escaped where they become HTML.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from typing import Any

from attrs import evolve, frozen

from isolate.capability.scope import Constraint, Range, Scope
from isolate.capability.token import Token
from isolate.messages.invoke import Budget


@frozen
class Seen:
    """A budget, and when it was told: seconds of ``time.monotonic``."""

    budget: Budget
    at: float


def share(left: int, of: int) -> str:
    """How much is left, in tenths."""
    if left <= 0:
        return "none"
    if left >= of:
        return "all"
    part = 100 * left / of
    return "under 10 %" if part < 10 else f"about {min(round(part / 10), 9) * 10} %"


def age(seconds: float) -> str:
    """How long ago, in its largest unit."""
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    return f"{int(seconds // 3600)} h ago" if seconds < 86400 else f"{int(seconds // 86400)} d ago"


def moment(at: int) -> str:
    """Unix seconds as a date and time, UTC, to the minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
    except (ValueError, OverflowError, OSError):
        return f"{at} (unix seconds)"


def _amount(limit: int | None, left: int | None, what: str, unlimited: str) -> str:
    if limit is None:
        return unlimited
    if left is None:
        return f"at most {limit} {what}"
    return f"{share(left, limit)} of {limit} {what} left"


def scope_of(token: Token) -> Scope:
    """What a token allows, without a lease where the grant has none: a later block cannot bring it in."""
    scope = token.scope
    return scope if token.claims[0].scope.lease is not None else evolve(scope, lease=None)


def limits(scope: Scope, seen: Seen | None) -> Iterator[tuple[str, str]]:
    """Name and text of every limit that there is; uses first, also where there is none."""
    budget = seen.budget if seen else None
    uses = _amount(scope.uses, budget.uses if budget else None, "uses", "any number of uses")
    yield "uses", uses
    if scope.bytes_out is not None:
        yield "bytes out", _amount(scope.bytes_out, budget.bytes_out if budget else None, "bytes out", "")
    for seconds, most in sorted((scope.rates or {}).items()):
        yield "rate", f"{most} uses in {seconds} s"
    if scope.lease is not None and scope.lease > 1:  # one use is no lease (docs/spec/capability.md, 5)
        yield "lease", f"leases of at most {scope.lease} uses"
    if scope.outputs is not None:
        kinds = (f"{kind}({', '.join(map(str, sizes))})" for kind, sizes in sorted(scope.outputs.items()))
        yield "outputs", "outputs " + (", ".join(kinds) or "none")
    for operation, parameters in sorted((scope.parameters or {}).items()):
        for name, constraint in sorted(parameters.items()):
            yield "argument", f"{operation}.{name} {constraint_text(constraint)}"
    if scope.minimum_group is not None:
        yield "group", f"groups of at least {scope.minimum_group}"
    if scope.not_before is not None:
        yield "from", f"from {moment(scope.not_before)}"
    if scope.expires is not None:
        yield "until", f"until {moment(scope.expires)}"


def constraint_text(constraint: Constraint) -> str:
    """As `isolate grant --parameter` takes it after the equals sign."""
    if isinstance(constraint, Range):
        return f"{constraint.least}..{constraint.most}"
    return ",".join(sorted(plain(str(one)) for one in constraint.values)) or "nothing"


def plain(said: str) -> str:
    """A text of somebody else's for a terminal: what would move its cursor is replaced.

    >>> plain("a\x1b[2Jb")
    'a?[2Jb'
    """
    return "".join(one if one.isprintable() else "?" for one in said)


def as_plain(value: Any) -> Any:
    r"""A result, or an entry's details, as JSON has it: bytes in hexadecimal digits.

    >>> as_plain({"handle": b"\x01\xff", "n": [1]})
    {'handle': '01ff', 'n': [1]}
    """
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [as_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(name): as_plain(one) for name, one in value.items()}
    return value


def text(kind: str, token: Token, seen: Seen | None, *, now: float) -> str:
    """One line, for repr."""
    scope = scope_of(token)
    names = ", ".join(sorted(scope.operations or {}))
    parts = [f"{kind} on {token.asset}: {names}", *(said for _, said in limits(scope, seen))]
    if seen:
        parts.append(f"budget as of {age(now - seen.at)}")
    return f"<{'; '.join(parts)}>"


def table(kind: str, token: Token, seen: Seen | None, *, now: float) -> str:
    """An HTML table, for notebooks. Whatever a token or a file says is escaped."""
    scope = scope_of(token)
    rows = [("asset", token.asset), ("operations", ", ".join(sorted(scope.operations or {})))]
    rows += limits(scope, seen)
    if scope.depth is not None:
        rows.append(("passed on", f"{scope.depth} times more" if scope.depth else "no further"))
    rows.append(("budget", f"as of {age(now - seen.at)}" if seen else "not asked yet: handle.budget"))
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(said)}</td></tr>" for name, said in rows)
    return f"<table><caption>{html.escape(kind)}</caption>{cells}</table>"
