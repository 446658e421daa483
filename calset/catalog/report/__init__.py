"""The HTML page of a subset. Must not know how a subset was selected, nor the Hub."""
