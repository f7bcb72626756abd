import numpy as np
import pytest

from npnorm.studies.communication import claims, messages, row_bytes
from npnorm.studies.communication_ranks import MESSAGES, SPLIT
from npnorm.studies.study import Verdict


@pytest.fixture
def results(quick):
    return quick("communication")[0]


def test_layer_norm_sends_twice_what_rms_norm_sends_once_or_all_in_one(results, verdicts):
    sent = {form: set(messages(results, form, "forward")) for form in MESSAGES}
    assert sent == {"RMSNorm": {1}, "two-pass": {2}, "packed": {1}, "gathered": {1}, "replicated": {0}}
    of = verdicts("communication")
    assert of["LayerNorm needs two all-reduces."] == of["RMSNorm needs one all-reduce."] == Verdict.HOLDS
    assert of["LayerNorm cannot do with fewer than two messages."] == Verdict.FAILS
    assert of["A norm of whole rows sends nothing."] == Verdict.HOLDS


def test_backward_every_split_norm_sends_once(results):
    assert {form: set(messages(results, form, "backward")) for form in SPLIT} == {form: {1} for form in SPLIT}
    assert set(messages(results, "replicated", "backward")) == {0}


def test_bytes_are_those_of_the_page_on_statistics(results):
    forward = {form: set(row_bytes(results, form, "forward")) for form in SPLIT}
    assert forward == {"RMSNorm": {8}, "two-pass": {24}, "packed": {16}, "gathered": {32}}
    assert set(row_bytes(results, "RMSNorm", "backward")) == {8}
    assert set(row_bytes(results, "packed", "backward")) == {16}


def test_a_block_sends_a_gather_and_a_sum_for_each_sublayer_beside_its_norms(results):
    for form in SPLIT:
        assert set(messages(results, form, "forward", "block")) == {2 * (len(MESSAGES[form]) + 2)}
        assert set(messages(results, form, "backward", "block")) == {2 * (1 + 2)}
    for direction in ("forward", "backward"):
        assert set(messages(results, "replicated", direction, "block")) == {2}


def test_the_packed_form_alone_loses_digits(results, verdicts):
    errors = {form: np.max([line[form]["errors"] for line in results.lines], axis=0) for form in SPLIT}
    assert all(np.all(errors[form] < 1e-14) for form in ("RMSNorm", "two-pass", "gathered"))
    assert errors["packed"][0] < 1e-14 < errors["packed"][1] < 1e-8
    assert np.isnan(errors["packed"][2])  # refused
    of = verdicts("communication")
    assert of["Packed, a mean of 1e3 standard deviations costs 6 digits of 16."] == Verdict.HOLDS
    assert of["Gathered, a mean of 1e5 standard deviations costs none."] == Verdict.HOLDS


def test_every_form_was_timed_and_rms_norm_is_the_measure(results):
    for line in results.lines:
        for form in MESSAGES:
            whats = ("forward", "backward", "block", *(["messages"] if form in SPLIT else []))
            assert all(0 < line[form][f"{what} seconds"] < 10 and line[form][f"{what} ratio"] > 0 for what in whats)
        assert line["RMSNorm"]["forward ratio"] == line["RMSNorm"]["block ratio"] == 1


def test_no_two_claims_say_the_same(results):
    says = [claim.says for claim in claims(results)]
    assert len(says) == len(set(says))
