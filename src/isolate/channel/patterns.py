"""The handshake patterns of Noise (revision 34, 7 and 18), each a row of one table.

    >>> from isolate.channel.patterns import parse_pattern
    >>> parse_pattern("XXpsk3").messages
    (('e',), ('e', 'ee', 's', 'es'), ('s', 'se', 'psk'))

A row is what each side knows beforehand (``"i"``, ``"r"``, ``"ir"`` or nothing: whose static key), then the
messages, the initiator's first. Channels use XXhfs; the other rows exist for the public vectors.
"""

from __future__ import annotations

import re

from attrs import frozen

from isolate.errors import UsageError

PATTERNS: dict[str, tuple[str, ...]] = {
    # What channels run: XX with hybrid forward secrecy (noise_hfs_spec).
    "XXhfs": ("", "e e1", "e ee ekem1 s es", "s se"),
    # One-way.
    "N": ("r", "e es"),
    "K": ("ir", "e es ss"),
    "X": ("r", "e es s ss"),
    # Interactive.
    "NN": ("", "e", "e ee"),
    "NK": ("r", "e es", "e ee"),
    "NX": ("", "e", "e ee s es"),
    "XN": ("", "e", "e ee", "s se"),
    "XK": ("r", "e es", "e ee", "s se"),
    "XX": ("", "e", "e ee s es", "s se"),
    "KN": ("i", "e", "e ee se"),
    "KK": ("ir", "e es ss", "e ee se"),
    "KX": ("i", "e", "e ee se s es"),
    "IN": ("", "e s", "e ee se"),
    "IK": ("r", "e es s ss", "e ee se"),
    "IX": ("", "e s", "e ee se s es"),
    # Deferred.
    "NK1": ("r", "e", "e ee es"),
    "NX1": ("", "e", "e ee s", "es"),
    "X1N": ("", "e", "e ee", "s", "se"),
    "X1K": ("r", "e es", "e ee", "s", "se"),
    "XK1": ("r", "e", "e ee es", "s se"),
    "X1K1": ("r", "e", "e ee es", "s", "se"),
    "X1X": ("", "e", "e ee s es", "s", "se"),
    "XX1": ("", "e", "e ee s", "es s se"),
    "X1X1": ("", "e", "e ee s", "es s", "se"),
    "K1N": ("i", "e", "e ee", "se"),
    "K1K": ("ir", "e es", "e ee", "se"),
    "KK1": ("ir", "e", "e ee se es"),
    "K1K1": ("ir", "e", "e ee es", "se"),
    "K1X": ("i", "e", "e ee s es", "se"),
    "KX1": ("i", "e", "e ee se s", "es"),
    "K1X1": ("i", "e", "e ee s", "se es"),
    "I1N": ("", "e s", "e ee", "se"),
    "I1K": ("r", "e es s", "e ee", "se"),
    "IK1": ("r", "e s", "e ee se es"),
    "I1K1": ("r", "e s", "e ee es", "se"),
    "I1X": ("", "e s", "e ee s es", "se"),
    "IX1": ("", "e s", "e ee se s", "es"),
    "I1X1": ("", "e s", "e ee s", "se es"),
}


@frozen
class Pattern:
    """``before``: whether initiator's and responder's static keys are known; ``psks``: how many keys it takes."""

    before: tuple[bool, bool]
    messages: tuple[tuple[str, ...], ...]
    psks: int
    hybrid: bool


def parse_pattern(name: str) -> Pattern:
    """The pattern of a name such as ``XX``, ``XXhfs`` or ``KKpsk0+psk2``. Raises UsageError for another."""
    base = re.sub(r"psk[0-9](\+psk[0-9])*\Z", "", name)
    places = [int(place) for place in re.findall(r"psk([0-9])", name)]
    row = PATTERNS.get(base)
    if row is None or len(set(places)) != len(places) or any(place >= len(row) for place in places):
        raise UsageError(f"no pattern of this core: {name[:40]}")
    messages = [list(tokens.split()) for tokens in row[1:]]
    for place in places:
        if place == 0:
            messages[0].insert(0, "psk")
        else:
            messages[place - 1].append("psk")
    return Pattern(
        ("i" in row[0], "r" in row[0]), tuple(tuple(tokens) for tokens in messages), len(places), "hfs" in base
    )
