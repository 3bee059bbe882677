"""The enclave: opens the sealed survey and serves aggregates over it. Mode: handle."""

from operations import by_education

import isolate
from isolate.enclave.runtime import Server


def main():
    with isolate.join() as workload:
        survey = isolate.sealed.load_file(workload.locate("survey/1996"), identity=workload)
        # Measured with the code: the owner of the survey may ask for larger groups than the operation does.
        least = workload.configuration.parameters.get("minimum_group", 0)
        Server(workload, "survey/1996", survey, [by_education], minimum_group=least).run()


main()
