"""Keeps what was built, answers questions about it, and turns it into named subsets that can be published.

Must not know engines, graders or how a model is pruned.
"""
