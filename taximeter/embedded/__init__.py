"""The parts that production runs as services, started on this machine: real engines on loopback, not imitations."""
