"""Overlap of questions with evaluation sets: the rule of ``--decontaminate``. Must not know where either comes from."""
