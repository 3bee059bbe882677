"""Aggregates over real people: what an analyst learns of a survey whose rows nobody but the enclave sees.

The American National Election Study of 1996 (944 people, examples/data): for each level of education, how many
would vote for a candidate, how old they are, how often they watch the news. A group of fewer than ten people is
left out, and looks exactly like a group of nobody. The stricter rule holds: here an ethics board's, for one handle.

Run it: python examples/clean_aggregates.py
Mode: handle. The platform is simulated. What aggregates still tell: docs/spec/operations.md, section 5.
"""

import gzip
import tempfile
from pathlib import Path

import numpy as np
from stage import Stage, load

from isolate.errors import IsolateError

HERE = Path(__file__).parent
APP = HERE / "clean_aggregates_app"


def survey():
    """The columns of the table, by name; the first is the entity: who answered."""
    lines = gzip.decompress((HERE / "data" / "anes96.csv.gz").read_bytes()).decode().splitlines()
    rows = np.loadtxt(lines[1:], delimiter=",", dtype=np.float64)
    table = {name: np.ascontiguousarray(rows[:, number]) for number, name in enumerate(lines[0].split(","))}
    return table | {"respondent": table["respondent"].astype(np.int64)}


def show(by_education, answer):
    said = by_education.output.read(answer)
    for group in by_education.output.groups:
        text = "not shown: fewer than the minimum, or nobody"
        if row := said.get(group):
            text = f"{row['people']} people, {row['age']:.0f} years, news on {row['news']:.1f} days a week"
        print(f"  {group:18}{text}")


def main(folder, table):
    by_education = load(APP / "operations.py").by_education
    with Stage(folder, "survey", "statistics") as stage:
        app = stage.application(APP)
        stage.admit(app, "survey/1996")
        stage.seal("survey/1996", table)
        print(f"sealed: {len(table['respondent'])} people; {stage.launch(app)}")
        few = int(((table["educ"] == 1) & (table["vote"] == 1)).sum())
        print(f"the owner knows: {few} with 8 grades or less would vote for Dole, and nobody has no school at all")
        with stage.handle("survey/1996", [by_education], uses=2) as analyst:
            for vote in ("Clinton", "Dole"):
                print(f"for {vote}, in groups of at least ten:")
                show(by_education, analyst.invoke("by_education", vote=vote))
            for what, arguments in (
                ("a third time", {"vote": "Dole"}),
                ("both candidates at once", {"vote": "anyone"}),
                ("a row", {"respondent": 1}),
            ):
                try:
                    analyst.invoke("by_education", **arguments)
                except IsolateError as error:
                    print(f"{what}: refused, {error.code}")
        with stage.handle("survey/1996", [by_education], minimum_group=50) as stricter:
            print("for Dole, under a handle that asks for fifty:")
            show(by_education, stricter.invoke("by_education", vote="Dole"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), survey())
