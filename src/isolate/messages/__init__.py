"""Floor 3: what enclave, client and service say to each other, as values in deterministic CBOR.

A message is an attrs class; ``encode`` gives its one byte form and ``parse`` reads only that. Nothing here
decides anything. ``http`` carries the bytes over any stream socket: whoever relays them learns the routes and
the public parts, and changes nothing without being noticed (docs/spec/service.md).
"""
