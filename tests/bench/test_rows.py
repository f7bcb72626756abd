import numpy as np
import pandas as pd
import pytest

from npnorm import LayerNorm
from npnorm.bench import rows
from npnorm.bench.rows import INPUTS, KINDS, contender, goals, measure, peak, report


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("given", INPUTS)
def test_every_norm_takes_every_input(norm, given):
    forward, backward = contender(norm, KINDS[norm].small, given, "float64")
    state = forward()
    dx = backward(state)[0]
    first = dx[0] if isinstance(dx, tuple) else dx
    assert first.shape == KINDS[norm].small
    assert np.isfinite(first).all()


def test_a_gradient_of_ones_vanishes_in_a_norm_that_centres():
    forward, backward = contender("LayerNorm", (8, 64), "dy of ones", "float64")
    assert abs(backward(forward())[0]).max() < 1e-7
    forward, backward = contender("LayerNorm", (8, 64), "ordinary", "float64")
    assert abs(backward(forward())[0]).max() > 0.1


def test_constant_rows_are_constant_where_the_norm_looks():
    for norm in ("LayerNorm", "BatchNorm", "GroupNorm", "InstanceNorm"):
        forward, _ = contender(norm, KINDS[norm].small, "constant", "float64")
        _, saved = forward()
        np.testing.assert_allclose(saved.rstd, LayerNorm(eps=1e-5).forward(np.ones((1, 2)))[1].rstd[0, 0], rtol=1e-12)


def test_extra_memory_is_that_beyond_the_result():
    def call():
        a = np.zeros(2**20, np.uint8)
        return {"kept": a.copy() + 1}

    _, extra = peak(call, lambda result: result)
    assert (
        2**20 <= extra < 1.1 * 2**20 or 2 * 2**20 <= extra < 2.1 * 2**20
    )  # the temporary, and a's copy if it is there


def slow(seconds, extra=0):
    line = {"norm": "N", "shape": "8x64", "compute": "float32", "op": "forward", "p10": 0, "p90": 0, "extra": 0}
    lines = [line | {"input": given, "median": 1.0} for given in INPUTS]
    lines[3] |= {"median": seconds, "extra": extra}
    return pd.DataFrame(lines)


@pytest.mark.parametrize(
    ("seconds", "extra", "met"), [(4.9, 0, "yes"), (5.1, 0, "no"), (1, 31 * 2**20, "yes"), (1, 2**25, "no")]
)
def test_a_goal_that_is_missed_is_told_with_its_place(seconds, extra, met):
    (line,) = goals(slow(seconds, extra)).to_dict("records")
    assert line["met"] == met
    assert (line["slowest"], line["where"]) == (
        max(seconds, 1),
        "8x64 forward, mean 5" if seconds > 1 else line["where"],
    )
    assert line["slow"] == f"{int(seconds > 5)} of {len(INPUTS) - 1}"
    assert f"| {seconds:.2f}"[2:] in report(slow(seconds, extra))


def test_the_report_has_a_line_for_each_call(monkeypatch):
    monkeypatch.setattr(rows, "EFFORT", rows.EFFORT._replace(seconds=0.0, turn=0.0))
    frame = measure(["RMSNorm", "GroupNorm"], quick=True)
    assert len(frame) == 2 * 2 * 2 * len(INPUTS)
    text = report(frame)
    assert text.count("| RMSNorm ") == 4 + 2  # of time and of the goals; of memory there is less than a MiB
