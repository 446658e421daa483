"""Walks a model block by block and collects statistics of its inputs. Must not know what a method does with them."""
