"""The demo: the whole chain on the bundled tiny reasoning model, reported whichever way it comes out."""
