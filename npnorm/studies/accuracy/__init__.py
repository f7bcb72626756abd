"""How accurate is a norm? npnorm and other libraries beside exact arithmetic, forward and backward.

    python -m npnorm.studies.accuracy                             the scoreboard
    python -m npnorm.studies.accuracy --write docs/accuracy.md    the page, and all cells in docs/data/accuracy.csv

The cases and the exact results are those of `npnorm.conformance`. In the order of reading:

    peers.py         who is measured: npnorm, the textbook, torch, flax, keras, equinox
    measure.py       every peer on every problem, and how far from exact it is
    page.py          the scoreboard, the cells, and the page, of which page.md has the prose
"""
