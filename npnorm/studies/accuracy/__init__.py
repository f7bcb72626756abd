"""How accurate is a norm? npnorm and other libraries beside exact arithmetic, forward and backward.

    python -m npnorm.studies.accuracy                             the scoreboard
    python -m npnorm.studies.accuracy --write docs/accuracy.md    the page with all tables as well

In the order of reading:

    formats.py       float16, bfloat16, float32, float64: precision, range, the unit in the last place
    cases.py         the rows that are normalized: plain ones, and those that go wrong
    problems.py      the same rows as the input of a LayerNorm, RMSNorm, GroupNorm and BatchNorm
    exact.py         the exact results, in numbers of 400 bits
    measure.py       how far from exact a result is
    peers/           who is measured: npnorm, naive NumPy, torch, flax, keras, equinox
    run.py           every peer on every problem
    scoreboard.py    the counts
    page.py          the page, of which page.md has the prose
    table.py         Markdown tables
    needs.py         what a study imports, and what it says where that is missing
"""
