import pytest

from npnorm.training import warmup_cosine


def test_it_rises_linearly_to_the_peak():
    assert [warmup_cosine(step, 100, 4, 2.0) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_it_falls_to_a_tenth_at_the_last_step():
    assert warmup_cosine(99, 100, 4, 2.0) == pytest.approx(0.2, rel=1e-12)


def test_half_way_down_it_is_the_middle():
    assert warmup_cosine(51, 100, 4, 2.0) == pytest.approx((2.0 + 0.2) / 2, rel=1e-12)


def test_it_never_rises_after_the_warmup():
    rates = [warmup_cosine(step, 100, 4, 2.0) for step in range(3, 100)]
    assert rates == sorted(rates, reverse=True)


def test_one_step_alone():
    assert warmup_cosine(0, 1, 1, 2.0) == 2.0
