import pytest

from tests.norms.bad_input.like_torch import ACCEPTED, REFUSED, verdict
from tests.norms.bad_input.page import PAGE, page


@pytest.mark.parametrize("what", [what for what, (theirs, _) in REFUSED.items() if theirs])
def test_torch_does_what_the_page_says_with_what_npnorm_refuses(what):
    theirs, torch_does = REFUSED[what]
    assert verdict(theirs, "accepted") == torch_does


@pytest.mark.parametrize(
    ("what", "ours", "npnorm_does", "theirs", "torch_does"), [pytest.param(*entry, id=entry[0]) for entry in ACCEPTED]
)
def test_npnorm_accepts_what_has_a_meaning(what, ours, npnorm_does, theirs, torch_does):
    assert (verdict(ours, "works"), verdict(theirs, "works")) == (npnorm_does, torch_does)


def test_npnorm_accepts_what_torch_refuses_in_four_places():
    assert [what for what, _, _, _, does in ACCEPTED if does.endswith("Error")] == [
        "GroupNorm: one sample, one element in a group",
        "BatchNorm, training: eps=0",
        "LayerNorm: float32 x, float64 weight",
        "LayerNorm: float32 x, float16 weight",
    ]


def test_the_page_is_what_the_data_make():
    assert PAGE.read_text(encoding="utf-8") == page()
