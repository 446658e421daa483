"""What an answer says: TeX read whole into values, and when two are equal; must not know responses, verdicts."""

from calset.builder.grading.answers.comparing import n_parts, same
from calset.builder.grading.answers.values import GoldUnread, PredUnread

__all__ = ["GoldUnread", "PredUnread", "n_parts", "same"]
