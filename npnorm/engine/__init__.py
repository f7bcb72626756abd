"""How a formula over rows is evaluated: right over the whole range of the dtype, and fast.

The mathematics of norms is not here, but on their pages. Read in this order; of `row`, what follows `difference` is
for norms that cast, measure a part or multiply dx:

    layout         what a row is: features, groups of channels, a batch
    row            what a formula may ask of its rows: mean, centre, eps
    statistics     mean and variance, on one rank and three ways on many
    exact          the formula in float64, with rows scaled by powers of two
    cancellation   dx where it is a small difference of large terms
    terms          a block of rows whose products wait: what makes it fast
    guards         which rows lost digits that way
    levels         one block: fast first, and the rows that lost digits again
    other_modules  the same for arrays of other modules than NumPy
    arguments      what a call is given: checks, and arrays that have passed them
    rows           all blocks: threads, one rounding, sums of gradients; the object that a norm talks to
    explain        how many rows of an array are evaluated at which level
"""

from npnorm.engine.exact import Formula
from npnorm.engine.explain import explain
from npnorm.engine.layout import Batch, Channels, Features, Groups, Samples, Subset
from npnorm.engine.row import (
    NO_BIAS,
    NO_WEIGHT,
    Row,
    accurate_where_dx_cancels,
    accurate_where_dx_cancels_without_eps,
)
from npnorm.engine.rows import Rows
from npnorm.engine.statistics import FORMS, Mean

__all__ = [
    "FORMS",
    "NO_BIAS",
    "NO_WEIGHT",
    "Batch",
    "Channels",
    "Features",
    "Formula",
    "Groups",
    "Mean",
    "Row",
    "Rows",
    "Samples",
    "Subset",
    "accurate_where_dx_cancels",
    "accurate_where_dx_cancels_without_eps",
    "explain",
]
