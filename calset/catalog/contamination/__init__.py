"""Overlap of questions with evaluation sets. Must not know where either comes from."""
