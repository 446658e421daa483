"""The demo: the whole chain on the bundled tiny reasoning model, through the public API alone."""
