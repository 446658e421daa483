"""Builds traces: problems in, token ids and verdicts into the catalog. Must not know how a model is pruned."""
