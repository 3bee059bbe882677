"""What a handle on the survey may name. The owner loads this file too, to learn the digest that it grants."""

import numpy as np

from isolate.enclave.operations import Aggregates, Choice, Count, Mean, Rows, operation

# Every group that an answer may speak of, whether anybody is in it or not. Nobody has "no school".
EDUCATION = (
    "no school", "8 grades or less", "some high school", "high school", "some college", "college degree",
    "master's degree", "PhD",
)  # fmt: skip
CANDIDATES = ("Clinton", "Dole")
PEOPLE = Aggregates(
    EDUCATION,
    {"people": Count(5), "age": Mean(18, 95, 77), "news": Mean(0, 7, 70)},
    minimum_group=10,
)


@operation(inputs={"vote": Choice(CANDIDATES)}, output=PEOPLE)
def by_education(view, vote):
    """It only selects rows: who would vote for this candidate. The gate counts, clips, rounds and leaves out.

    There is no "anyone" beside the two: all, less those for one, would be those for the other, also where these
    are too few to show.
    """
    rows = view["vote"] == CANDIDATES.index(vote)
    columns = {"age": view["age"][rows], "news": view["TVnews"][rows]}
    return Rows(view["respondent"][rows], view["educ"][rows].astype(np.int64), columns)
