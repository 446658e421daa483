"""Prunes a causal language model against a calibration subset and proves the result.

Must not know how traces are built.
"""
