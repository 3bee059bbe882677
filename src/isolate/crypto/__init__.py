"""Floor 1: suites, keys, key derivation, signatures, deterministic CBOR and Merkle trees.

Only this package calls a cryptographic library. It makes no policy: it refuses what is malformed and
answers whether something authenticates.
"""
