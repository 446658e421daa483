"""Decides which (problem, sample index) is generated next, and when a problem has enough. Must not know engines."""
