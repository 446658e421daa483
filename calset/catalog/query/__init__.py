"""Questions to the catalog and their answers: statistics, one trace, SQL conditions, what is left to grade.

Must not know subsets or the Hub.
"""
