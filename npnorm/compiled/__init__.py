"""The formula of a page as C: written once, compiled, and used where it agrees with `npnorm.engine`. Optional.

Nobody who works on NumPy arrays comes here. `npnorm.engine.other_modules` loads it when the first array of CuPy comes.

    trace     the formula, called with symbols: what is to be computed
    c         what is computed as expressions, and as loops over the elements of a row; for any target
    cuda      the loops and sums of the threads of a block: one kernel for each direction
    check     a kernel at its first use, held against the exact evaluation
    device    kernels on arrays of CuPy: compiled, checked, launched
"""
