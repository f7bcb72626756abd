"""How fast is a norm? npnorm, other libraries, and a plain copy of the same memory, side by side.

    python -m npnorm.bench --quick                      a minute: a few sizes
    python -m npnorm.bench --write docs/speed.md        all of it, and the tables of the page
    python -m npnorm.bench --gpu                        CuPy arrays against torch on the same GPU

In the order of reading:

    grid.py          which norms of which sizes, and how long each is measured
    timing.py        contenders take turns; medians and spreads
    naive.py         the textbook in float32
    peers.py         who is measured on a norm, and the copy that none can beat
    torch_step.py    the transformer of npnorm in torch
    step.py          a step of training, ours and torch's
    memory.py        the largest extra memory of a call
    records.py       what was measured, and the file it travels in
    child.py         the process that measures: one heap, one number of threads
    run.py           starts these processes
    machine.py       the machine, the versions
    rows.py          rows that need care, beside ordinary ones
    table.py         tables, for the terminal and for a page
    report.py        what was measured as tables
    summary.py       a line for each goal
    plot.py          bytes per second by size
    page.py          the tables within docs/speed.md
    gpu.py           the same question on a GPU
    needs.py         what this imports beside NumPy, and what it says where that is missing
"""
