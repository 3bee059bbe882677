"""An inference enclave: opens the sealed model and serves handles on it.

Mode: handle. Whoever invokes an operation gets its result and never the model.
"""

from operations import OPERATIONS

import isolate
from isolate.enclave.runtime import Server


def main():
    with isolate.join() as workload:
        workload.report("attested", rank=workload.slot.rank, instance=workload.result.instance.hex())
        model = isolate.sealed.load_file(workload.locate("digits/model"), identity=workload)
        Server(workload, "digits/model", model, OPERATIONS).run()


main()
