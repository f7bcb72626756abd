import re

import numpy as np

from npnorm.conformance.machine import cores, machine


def test_the_machine_says_what_matters():
    found = machine(["numpy", "no_such_package"])
    assert f"numpy {np.__version__}" in found["versions"]
    assert "no_such_package" not in found["versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert f", {cores()} cores, " in found["processor"]
    assert "openblas" in found["BLAS and OpenMP"]
