"""Drops whole experts or blocks and writes the smaller checkpoint. Must not know masks within a matrix."""
