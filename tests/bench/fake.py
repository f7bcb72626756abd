"""Numbers that were never measured."""

import pandas as pd

from npnorm.bench.run import COLUMNS

COPY = 1.0
"""Seconds of the faster copy."""

PEERS = {"f64": (4, 6), "f32": (2, 3), "out": (1, 3), "naive": (8, 12), "torch": (4, 6)}


def frame(*parts):
    """Return lines as the long table."""
    return pd.DataFrame([line for part in parts for line in part], columns=COLUMNS)


def case(norm="RMSNorm", mib=256, heap="default", threads=1, section="norms", shape=None, **peers):
    """Return the lines of a case; without peers torch takes 4 + 6 s, npnorm 2 + 3, the textbook 8 + 12."""
    place = {"section": section, "norm": norm, "shape": shape or f"{mib}MiB", "mib": mib, "input": ""}
    place |= {"heap": heap, "threads": threads}
    found = [
        place | {"peer": peer, "op": op, **seconds(s)}
        for peer, (there, back) in (peers or PEERS).items()
        for op, s in (("forward", there), ("backward", back), ("both", there + back))
    ]
    return [*found, *(place | {"peer": n, "op": "both", **seconds(s)} for n, s in (("copyto", 2), ("multiply", COPY)))]


def seconds(median, noise=0.0):
    return {"median": median, "p10": median * (1 - noise / 2), "p90": median * (1 + noise / 2), "rounds": 9}


def step(npnorm=0.9, torch=1.0, heap="default", threads=1):
    lines = case("a model", 1, heap, threads, "step", npnorm=(npnorm, 0), torch=(torch, 0))
    return [line for line in lines if line["op"] == "both" and line["peer"] in ("npnorm", "torch")]


def rows(norm="LayerNorm", peer="f32", ordinary=1.0, extra=0, **inputs):
    """Return the lines of a norm on rows that need care; the inputs are named with _ for a blank."""
    place = {"section": "rows", "norm": norm, "shape": "4096x1024", "mib": 16, "heap": "retained", "threads": 2}
    times = {"ordinary": ordinary} | {name.replace("_", " "): s for name, s in inputs.items()}
    return [
        place | {"peer": peer, "input": name, "op": op, "extra": extra * (name != "ordinary"), **seconds(s)}
        for name, s in times.items()
        for op in ("forward", "backward")
    ]


def memory(**extra):
    place = {"section": "memory", "norm": "RMSNorm", "shape": "8x64", "mib": 1, "heap": "default", "threads": 1}
    return [
        place | {"input": "", "peer": peer, "op": op, "extra": nbytes}
        for peer, both in extra.items()
        for op, nbytes in zip(("forward", "backward"), both, strict=True)
    ]
