"""What an implementation of a norm is held against; `docs/check_a_kernel.md` shows how.

    ulps.py        the error of a row, in units in the last place
    cases.py       the hard cases: rows on which norms go wrong
    problems.py    the rows of a case as the input of a LayerNorm, RMSNorm, GroupNorm or BatchNorm
    textbook.py    these four norms as they are written first, in NumPy
    exact.py       their exact results: the textbook in numbers of 400 bits (needs gmpy2)
    machine.py     on which machine, with which libraries

It needs `ml_dtypes` beside NumPy, for bfloat16.
"""
