"""Identity, prompts, reasoning format and recommended sampling of a model, before a weight is loaded.

Must not know problems or the catalog.
"""
