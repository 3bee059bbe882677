"""Floor 5, inside: what runs in an enclave. It imports no service, no client and nothing of the host side."""
