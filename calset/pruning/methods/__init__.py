"""Scores, masks, weight updates and allocations, as functions of tensors. Must not know files or models."""
