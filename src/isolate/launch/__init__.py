"""Floor 5, the host side: measure, launch, carry bytes. Nothing here is trusted with data, except that the
simulated platform stands in for hardware and is trusted to measure what it launches."""
