"""Whole catalogs: merge, compact, check. Must not know selections or engines."""
