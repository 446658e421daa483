"""Brings traces of other programs into the catalog. Must not know engines."""
