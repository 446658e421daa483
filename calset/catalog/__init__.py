"""Keeps problems, runs, traces, grades and subsets in one DuckDB file, and turns questions to it into subsets."""
