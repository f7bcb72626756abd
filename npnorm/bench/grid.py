"""What is measured: which norms of which sizes, and for how long."""

import math
from typing import NamedTuple

NORMS = ("RMSNorm", "LayerNorm", "BatchNorm", "GroupNorm")
"""The norms that are held against other libraries."""

GROUPS = 8
"""Groups of every GroupNorm."""

EPS = 1e-5
"""Of every norm."""

SECTIONS = ("norms", "small", "step", "rows", "scaling", "memory")
"""The parts of a run, in the order of the tables."""


class Case(NamedTuple):
    """A norm and the shape of its float32 input.

    Examples
    --------
    >>> case = Case("RMSNorm", (8192, 8192))
    >>> case.size, case.mib
    ('8192x8192', 256.0)
    """

    norm: str
    shape: tuple[int, ...]

    @property
    def size(self) -> str:
        """The shape in a few characters."""
        return "x".join(map(str, self.shape))

    @property
    def mib(self) -> float:
        """The size of x in MiB."""
        return math.prod(self.shape) / 2**18


def traffic(norm: str, op: str) -> int:
    """Return how many arrays of the size of x the operation must move at least, read or written.

    forward reads x and writes y; backward reads dy and x and writes dx. The rows of BatchNorm run through the whole
    array, so that what is read is read twice unless all of it fits in cache.

    Examples
    --------
    >>> [traffic("LayerNorm", op) for op in ("forward", "backward", "both")]
    [2, 3, 5]
    >>> [traffic("BatchNorm", op) for op in ("forward", "backward", "both")]
    [3, 5, 8]
    """
    forward, backward = (3, 5) if norm == "BatchNorm" else (2, 3)
    return {"forward": forward, "backward": backward, "both": forward + backward}[op]


class Effort(NamedTuple):
    """How long a case is measured.

    After so many seconds no further round begins, if there were `least`; in each of at most `most` rounds every
    contender has one turn. `warm` rounds come before the first that counts. A contender that is faster than `turn`,
    in seconds, is called several times in its turn.
    """

    seconds: float
    least: int
    most: int
    warm: int = 2
    turn: float = 2e-3


class Sizes(NamedTuple):
    """The transformer whose training step is measured."""

    depth: int = 4
    width: int = 256
    heads: int = 4
    length: int = 128
    batch: int = 8
    vocabulary: int = 512


class Grid(NamedTuple):
    """All that a run measures: cases of four sections, the transformer, which rows that need care, and the effort."""

    norms: tuple[Case, ...]
    small: tuple[Case, ...]
    scaling: tuple[Case, ...]
    memory: tuple[Case, ...]
    effort: Effort
    step_effort: Effort
    rows_effort: Effort
    step: Sizes = Sizes()
    large_rows: bool = False


def _both(*shapes: tuple[int, ...], norms: tuple[str, ...] = ("RMSNorm", "LayerNorm")) -> tuple[Case, ...]:
    return tuple(Case(norm, shape) for norm in norms for shape in shapes)


def _images(*shapes: tuple[int, ...]) -> tuple[Case, ...]:
    return _both(*shapes, norms=("BatchNorm", "GroupNorm"))


GRIDS = {
    "full": Grid(
        norms=(
            *_both((512, 512), (4096, 1024), (2048, 4096), (8192, 8192)),
            *_images((16, 64, 28, 28), (32, 64, 56, 56)),
        ),
        small=_both((8, 64), (1, 4096)),
        scaling=_both(
            *((rows, 1024) for rows in (64, 256, 1024, 4096, 16384)),
            *((2**22 // width, width) for width in (64, 256, 4096, 16384, 65536)),
        ),
        memory=(*_both((2048, 4096)), *_images((32, 64, 56, 56))),
        effort=Effort(seconds=5, least=9, most=200),
        step_effort=Effort(seconds=12, least=9, most=40),
        rows_effort=Effort(seconds=0.3, least=2, most=25, warm=1),
        large_rows=True,
    ),
    "quick": Grid(
        norms=(*_both((512, 512), (2048, 4096)), *_images((16, 64, 28, 28))),
        small=_both((8, 64), (1, 4096)),
        scaling=_both((256, 1024), (16384, 64), (16, 65536)),
        memory=_both((2048, 4096)),
        effort=Effort(seconds=0.4, least=5, most=50, warm=1),
        step_effort=Effort(seconds=1, least=3, most=5, warm=1),
        rows_effort=Effort(seconds=0.2, least=3, most=25, warm=1),
    ),
    "tiny": Grid(
        norms=(*_both((32, 64)), *_images((2, 16, 4, 4))),
        small=_both((8, 64)),
        scaling=_both((16, 64)),
        memory=_both((256, 1024)),
        effort=Effort(seconds=0, least=3, most=5, warm=1, turn=1e-4),
        step_effort=Effort(seconds=0, least=3, most=3, warm=1, turn=1e-4),
        rows_effort=Effort(seconds=0, least=2, most=2, warm=1, turn=1e-4),
        step=Sizes(depth=1, width=32, heads=2, length=16, batch=2, vocabulary=32),
    ),
}
"""By name, as the command and the measuring processes say them; `tiny` is for tests, its times say nothing."""
