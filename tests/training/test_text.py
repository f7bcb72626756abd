import math

import numpy as np
import pytest

from npnorm.training import Characters, batch, language_reference, unigram_entropy
from npnorm.training.text import read, split


def test_the_default_text_is_long_and_the_same_each_time():
    text = language_reference()
    assert len(text) > 300_000
    assert text == language_reference()


def test_encode_and_decode_are_inverse():
    text = "norm(x) → z, été, 數, 🙂\n"
    characters = Characters(text)
    assert characters.size == len(set(text))
    assert characters.decode(characters.encode(text)) == text


def test_an_unknown_character_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"\['!', 'z'\] are not among the 3 characters"):
        Characters("abc").encode("a!z")


def test_unigram_entropy_by_hand():
    # p = 3/4 and 1/4
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_entropy(np.array([7, 7, 2, 7])) == pytest.approx(expected, rel=1e-14)


def test_targets_are_the_next_characters():
    ids = np.arange(100)
    inputs, targets = batch(ids, 5, 7, np.random.default_rng(0))
    assert inputs.shape == targets.shape == (5, 7)
    np.testing.assert_array_equal(targets, inputs + 1)


def test_every_window_can_be_drawn():
    rng = np.random.default_rng(0)
    firsts = {int(batch(np.arange(6), 1, 3, rng)[0][0, 0]) for _ in range(100)}
    assert firsts == {0, 1, 2}


def test_split_keeps_the_order_and_loses_nothing():
    ids = np.arange(1000)
    learn, held_out = split(ids, 10)
    np.testing.assert_array_equal(np.concatenate([learn, held_out]), ids)
    assert len(held_out) == 100


def test_a_text_that_is_too_short_is_an_error_that_says_how_long():
    with pytest.raises(ValueError, match="has 99 characters; windows of 10 need at least 110"):
        split(np.arange(99), 10)
    split(np.arange(110), 10)


def test_a_file_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"x\.bin is not UTF-8 text"):
        read(tmp_path / "x.bin")
