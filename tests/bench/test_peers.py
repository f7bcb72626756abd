import inspect

import numpy as np
import pytest

from npnorm.bench.grid import NORMS, Case
from npnorm.bench.peers import ABOUT, COPIES, PEERS, contenders, own, pose
from npnorm.threads import set_threads

SHAPES = {"RMSNorm": (12, 24), "LayerNorm": (12, 24), "BatchNorm": (3, 16, 5, 4), "GroupNorm": (3, 16, 5, 4)}
EACH = pytest.mark.parametrize("norm", NORMS)


def expected(problem):
    """Return y, dx and the gradients of the norm, computed in float64."""
    norm = own(problem, "float64")
    y, saved = norm.forward(problem.x)
    dx, grads = norm.backward(problem.dy, saved)
    return [y, dx, *grads.values()]


def near(came, right):
    assert len(came) == len(right)
    for a, b in zip(came, right, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5 * abs(b).max())


@EACH
def test_the_textbook_is_the_norm_in_float32(norm):
    problem = pose(Case(norm, SHAPES[norm]))
    forward, backward = PEERS["naive"](problem)
    state = forward()
    dx, grads = backward(state)
    came = [state[0], dx, *grads.values()]
    assert {a.dtype.name for a in came} == {"float32"}
    near(came, expected(problem))


@EACH
@pytest.mark.parametrize("peer", ["f64", "f32", "out"])
def test_npnorm_is_the_norm_with_either_precision_and_into_outputs(norm, peer):
    problem = pose(Case(norm, SHAPES[norm]))
    forward, backward = PEERS[peer](problem)
    state = forward()
    dx, grads = backward(state)
    near([state[0], dx, *grads.values()], expected(problem))
    assert (state[0] is problem.out) == (dx is problem.dout) == (peer == "out")


@EACH
def test_torch_is_the_norm(norm):
    problem = pose(Case(norm, SHAPES[norm]))
    forward, backward = PEERS["torch"](problem)
    y = forward()
    near([y.detach().numpy(), *(a.numpy() for a in backward(y))], expected(problem))


@EACH
def test_jax_is_the_norm(norm):
    problem = pose(Case(norm, SHAPES[norm]))
    forward, backward = PEERS["jax"](problem)
    state = forward()
    near([state[0], *backward(state)], expected(problem))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("copy", "factor"), {"copyto": 1, "multiply": 2}.items())
def test_a_copy_moves_all_of_x(copy, factor, threads):
    problem = pose(Case("RMSNorm", (3 * 512 + 1, 512)))
    set_threads(threads)
    try:
        COPIES[copy](problem).forward()
    finally:
        set_threads(None)
    np.testing.assert_array_equal(problem.out, factor * problem.x)


def test_copies_come_after_the_peers_and_all_peers_are_explained():
    assert list(contenders(Case("RMSNorm", (4, 8)), ["naive", "f32"])) == ["naive", "f32", "copyto", "multiply"]
    assert list(contenders(Case("RMSNorm", (4, 8)), ["naive"], copies=False)) == ["naive"]
    assert list(ABOUT) == list(PEERS)


def test_every_contender_of_a_case_sees_the_same_arrays():
    first, second = pose(Case("LayerNorm", (4, 8))), pose(Case("LayerNorm", (4, 8)))
    for a, b in zip([first.x, first.dy, *first.params], [second.x, second.dy, *second.params], strict=True):
        np.testing.assert_array_equal(a, b)
    assert inspect.signature(contenders).parameters["copies"].default is True
