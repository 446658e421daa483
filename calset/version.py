"""The version of calset, apart from the public names, so that every part may read it."""

__version__ = "0.1.0"
