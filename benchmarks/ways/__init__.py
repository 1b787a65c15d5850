"""The ways of moving a connection that benchmarks/others.py compares with ours, and the peer that looks."""


class Unfit(Exception):
    """A way that cannot be gone here: why, in its programs' words where they are theirs."""
