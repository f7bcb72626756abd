"""How fast is a norm? npnorm, other libraries, and a plain copy of the same memory, side by side.

    python -m npnorm.bench --quick                      a minute or two: a few sizes
    python -m npnorm.bench --rows                       rows that need care, beside ordinary ones
    python -m npnorm.bench --write docs/speed.md        all of it, and the tables of the page
    python -m npnorm.bench --gpu                        CuPy arrays against torch on the same GPU

In the order of reading:

    grid.py          which norms of which sizes, and how long each is measured
    timing.py        contenders take turns; medians and spreads
    peers.py         who is measured on a norm, and the copy that none can beat
    rows.py          a norm on rows that need care
    step.py          a step of training, ours and torch's
    memory.py        the largest extra memory of a call
    run.py           a process for each heap and number of threads, and the one table of what all of them measured
    tables.py        its pivots, and the goals
    plot.py          bytes per second by size
    gpu.py           the same question on a GPU
"""
