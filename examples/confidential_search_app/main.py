"""The enclave: opens sealed weights and sealed documents, and answers with titles. Mode: handle."""

from operations import LIBRARY, Library, nearest_titles

import isolate
from isolate.enclave.runtime import Server
from isolate.enclave.view import View


def main():
    with isolate.join() as workload:
        model = isolate.sealed.load_file(workload.locate("acme/minilm"), identity=workload)
        papers = isolate.sealed.load_file(workload.locate("acme/decisions"), identity=workload)
        LIBRARY.append(Library(View({**model, **papers})))
        Server(workload, "acme/decisions", papers, [nearest_titles]).run()


main()
