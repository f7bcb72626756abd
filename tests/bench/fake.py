"""Numbers that were never measured."""

from npnorm.bench.grid import Case
from npnorm.bench.records import Measured, MemoryUse, Record
from npnorm.bench.timing import Spread

COPY = 1.0
"""Seconds of the faster copy."""


def times(forward, backward, both=None, noise=0.0):
    """Return the times of a contender whose spread is `noise` of the median."""
    both = forward + backward if both is None else both
    seconds = {"forward": forward, "backward": backward, "both": both}
    return {op: Spread(s, s * (1 - noise / 2), s * (1 + noise / 2), 9) for op, s in seconds.items()}


def copies():
    return {"copyto": {"both": Spread(COPY, COPY, COPY, 9)}, "multiply": {"both": Spread(2 * COPY, COPY, COPY, 9)}}


def record(norm="RMSNorm", shape=(8192, 8192), regime="default", threads=1, section="norms", **peers):
    """Return a record; without peers torch takes 4 + 6 s, npnorm 2 + 3, the textbook 8 + 12."""
    chosen = peers or {"f64": (4, 6), "f32": (2, 3), "out": (1, 3), "naive": (8, 12), "torch": (4, 6)}
    measured = {name: times(*seconds) for name, seconds in chosen.items()}
    return Record(section, Case(norm, shape), regime, threads, measured | copies())


def step(npnorm=0.9, torch=1.0, regime="default", threads=1):
    both = {"npnorm": npnorm, "torch": torch}
    found = {name: {"both": Spread(seconds, seconds, seconds, 9)} for name, seconds in both.items()}
    return Record("step", Case("a model", (8, 128)), regime, threads, found)


def measured(*records):
    uses = [MemoryUse("RMSNorm", (8, 64), "f32", 2**20, 2**21), MemoryUse("RMSNorm", (8, 64), "torch", 0, 2**19)]
    return Measured(list(records), uses, {"default heap, 1 thread": 0.25}, {"processor": "of paper"})
