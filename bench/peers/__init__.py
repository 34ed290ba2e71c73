"""Peers: every way of patching that a comparison can measure, one short file each, ours among them."""
