"""Evaluates a model on held-out problems: builds traces, then reads them. Must not know how pruning works."""
