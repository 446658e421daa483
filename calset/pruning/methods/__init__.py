"""Scores, masks, weight updates and allocations. Must not know how a pruning is planned, continued or reported."""
