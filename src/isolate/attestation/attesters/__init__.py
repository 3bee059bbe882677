"""Attesters: how the inside of an enclave gets evidence for its runtime map. ``attest(runtime) -> evidence``."""
