"""The ways of moving a connection that benchmarks/others.py compares with ours, and the peer that looks."""
