"""Files, the Hub and the terminal; knows nothing of problems, traces or models."""
