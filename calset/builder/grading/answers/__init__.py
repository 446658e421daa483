"""What an answer says: TeX read whole into values, and when two are equal; must not know responses, verdicts."""
