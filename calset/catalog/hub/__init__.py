"""Subsets on the Hugging Face Hub: publish, pull, search. Must not know how a subset was selected."""
