"""Prunes a causal language model against a calibration subset, proves what it did, and evaluates the result."""
