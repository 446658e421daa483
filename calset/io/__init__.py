"""Reads and writes what lies outside the catalog: files, terminals, the Hub, model folders.

Must not know problems, traces, subsets or pruning.
"""
