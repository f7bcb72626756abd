import contextvars
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest

from npnorm import GroupNorm, LayerNorm
from npnorm.threads import KEPT, LAUNCHERS, default_threads, get_threads, parallel_for, scratch, set_threads
from tests.check import same_bits
from tests.interrupts import on_all_threads

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def the_setting_stays():
    yield
    set_threads(None)


@pytest.fixture
def no_collector():
    """Let an array live as long as something refers to it, and no longer: cycles are not collected."""
    gc.disable()
    yield
    gc.enable()


def program(text, *arguments, **environment):
    """Run a Python program, or with arguments a function of `tests/interrupts.py`; return its output."""
    command = [sys.executable, "-c", text] if not arguments else [sys.executable, "-m", text, *map(str, arguments)]
    environment = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
def test_each_index_is_called_once(threads, count):
    called = []
    parallel_for(called.append, count, threads)
    assert sorted(called) == list(range(count))


def test_several_threads_take_part():
    seen = set()
    on_all_threads(3, lambda i: seen.add(threading.get_ident()))
    assert len(seen) == 3
    assert threading.get_ident() in seen


def test_one_thread_is_the_callers():
    seen = set()
    parallel_for(lambda i: seen.add(threading.get_ident()), 50, 1)
    assert seen == {threading.get_ident()}


def test_more_threads_than_work_are_not_asked():
    seen = set()
    parallel_for(lambda i: seen.add(threading.get_ident()), 1, 4)
    assert seen == {threading.get_ident()}


def test_without_a_number_the_setting_counts():
    together = threading.Barrier(2)
    set_threads(2)
    parallel_for(lambda i: together.wait(timeout=20), 2)  # two at once, or the barrier breaks
    set_threads(1)
    seen = set()
    parallel_for(lambda i: seen.add(threading.get_ident()), 50)
    assert seen == {threading.get_ident()}


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_on_any_thread_is_raised_at_the_caller(bad):
    def fail(i):
        if i == bad:
            raise KeyError(f"number {i}")

    with pytest.raises(KeyError, match=f"number {bad}"):
        on_all_threads(3, fail)


@pytest.mark.parametrize("threads", [1, 2])
def test_after_an_error_nothing_more_is_begun_and_later_work_runs(threads):
    begun = []

    def fail_at_first(i):
        begun.append(i)
        if i == 0:
            raise ValueError("no")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="no"):
        parallel_for(fail_at_first, 10_000, threads)
    assert len(begun) < 1000
    test_each_index_is_called_once(threads, 100)
    test_several_threads_take_part()


def test_after_an_error_on_a_helper_nothing_more_is_begun():
    caller, begun = threading.get_ident(), []

    def fail_on_a_helper(i):
        begun.append(i)
        if threading.get_ident() != caller:
            raise ValueError("no")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="no"):
        parallel_for(fail_on_a_helper, 10_000, 2)
    assert len(begun) < 1000


def test_the_error_of_the_caller_comes_first():
    caller, failed = threading.get_ident(), threading.Event()

    def fail(i):
        if threading.get_ident() == caller:
            assert failed.wait(timeout=20)
            time.sleep(0.005)
            raise KeyError("of the caller")
        failed.set()
        raise ValueError("of a helper")

    with pytest.raises(KeyError, match="of the caller"):
        on_all_threads(3, fail)


def test_an_error_waits_for_the_other_threads():
    ended = []

    def fail_or_be_slow(i):
        if i == 0:
            raise ValueError("no")
        time.sleep(0.05)
        ended.append(i)

    with pytest.raises(ValueError, match="no"):
        on_all_threads(2, fail_or_be_slow)
    assert ended == [1]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads on this system")
@pytest.mark.parametrize(
    ("when", "numbers"),
    [
        ("while_helpers_work", (2,)),
        ("while_helpers_work", (3,)),
        ("while_helpers_work", (4,)),
        ("at_random", (2, 1)),
        ("at_random", (3, 2)),
        ("at_random", (4, 3)),
        ("at_each_step", (2,)),
        ("at_each_step", (3,)),
        ("at_each_step_of_the_first_call", (3,)),
        ("of_slow_helpers", (2,)),
        ("of_slow_helpers", (3,)),
        ("in_a_handler", (3,)),
        ("in_scratch", ()),
    ],
)
def test_an_interrupt_waits_for_the_other_threads(when, numbers):
    program("tests.interrupts", when, *numbers)


@pytest.mark.parametrize("bad", [{0}, {1}, {2}, {0, 1, 2}], ids=str)
def test_nothing_holds_the_arrays_of_work_that_failed(bad, no_collector):
    a = np.ones(5)
    alive = weakref.ref(a)

    def fail(i, a=a):
        if i in bad:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        on_all_threads(3, fail)
    del a, fail
    assert alive() is None


def test_a_helper_that_comes_late_holds_no_arrays(no_collector):
    for _ in range(100):
        a = np.ones(5)
        alive = weakref.ref(a)
        parallel_for(lambda i, a=a: None, 3, 3)
        del a
        assert alive() is None


def test_what_is_shared_within_work_runs_on_its_thread():
    on_all_threads(3)  # one helper more than take part
    pairs = []

    def outer(_):
        mine = threading.get_ident()
        parallel_for(lambda j: (pairs.append((mine, threading.get_ident(), j)), time.sleep(0.001)), 20, 3)

    on_all_threads(2, outer)
    assert len(pairs) == 40
    assert all(outer == inner for outer, inner, _ in pairs)
    assert len({outer for outer, _, _ in pairs}) == 2


def test_nobody_waits_for_the_work_of_others():
    begun, end, called = threading.Barrier(4), threading.Event(), []

    def all_helpers_work(i):
        begun.wait(timeout=20)
        assert end.wait(timeout=20)

    other = threading.Thread(target=parallel_for, args=(all_helpers_work, 3, 3))
    other.start()
    begun.wait(timeout=20)
    parallel_for(called.append, 40, 3)
    assert sorted(called) == list(range(40))
    assert not end.is_set()
    end.set()
    other.join(timeout=20)
    assert not other.is_alive()


def test_two_threads_of_the_caller_may_share_at_once():
    sums = {}

    def caller(name):
        found = []
        for _ in range(50):
            parallel_for(found.append, 40, 2)
        sums[name] = sorted(found)

    threads = [threading.Thread(target=caller, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sums == dict.fromkeys("ab", sorted(list(range(40)) * 50))


def test_norms_on_two_threads_of_the_caller_give_the_same_bits():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1100, 1000)).astype("float32")  # enough for several threads
    norm = LayerNorm(rng.standard_normal(1000).astype("float32"))
    set_threads(2)

    def run():
        y, saved = norm.forward(x)
        dx, grads = norm.backward(x, saved)
        return {"y": y, "dx": dx, **grads}

    expected, problems = run(), []

    def caller():
        try:
            for _ in range(4):
                same_bits(run(), expected)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=caller) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert problems == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_norms_work_in_a_forked_process():
    said = program("""
import os, signal, numpy as np
from npnorm import LayerNorm
from npnorm.threads import set_threads
set_threads(2)
x = np.random.default_rng(2).standard_normal((1100, 1000)).astype("float32")
norm = LayerNorm(np.ones(1000, "float32"))
expected = norm.forward(x)[0]
pid = os.fork()
if not pid:
    signal.alarm(30)
    os._exit(0 if np.array_equal(norm.forward(x)[0], expected) else 1)
print(os.waitpid(pid, 0)[1], np.array_equal(norm.forward(x)[0], expected))
""")
    assert said.split() == ["0", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_may_be_forked_while_threads_work():
    said = program("""
import os, signal, threading
from npnorm.threads import parallel_for
together, children = threading.Barrier(2), []
def work(i):
    together.wait(timeout=20)
    if i == 0:
        children.append(os.fork())
        if not children[0]:
            signal.alarm(30)
            both = threading.Barrier(2)
            parallel_for(lambda j: both.wait(timeout=20), 2, 2)  # new threads
            os._exit(0)
        children.append(os.waitpid(children[0], 0)[1])
parallel_for(work, 2, 2)
print(children[1])
""")
    assert said.split() == ["0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_does_not_do_the_work_that_others_were_asked_for():
    said = program("""
import os, signal, threading
from npnorm.threads import parallel_for
begun, end, children, called = threading.Barrier(2), threading.Event(), [], []
def busy(i):
    if i == 1:
        begun.wait(timeout=20)  # the only helper is at work
    end.wait(timeout=20)
threading.Thread(target=parallel_for, args=(busy, 2, 2)).start()
begun.wait(timeout=20)
def work(i):
    called.append(i)
    if i == 0:
        children.append(os.fork())
        if not children[0]:
            signal.alarm(30)
            both = threading.Barrier(2)
            parallel_for(lambda j: both.wait(timeout=20), 2, 2)
            os._exit(len(called) - 1)
        children.append(os.waitpid(children[0], 0)[1])
parallel_for(work, 20, 2)
end.set()
print(children[1], len(called))
""")
    assert said.split() == ["0", "20"]


def test_workers_see_the_floating_point_settings_of_the_caller():
    seen = []
    with np.errstate(over="raise", divide="print", under="warn", invalid="ignore"):
        np.setbufsize(4096)
        expected = np.geterr(), 4096
        on_all_threads(3, lambda i: seen.append((np.geterr(), np.getbufsize())))
    assert seen == [expected] * 3


def test_floating_point_errors_of_workers_are_raised_at_the_caller():
    huge = np.full(3, 3e38, "float32")
    with np.errstate(over="raise"), pytest.raises(FloatingPointError, match="overflow"):
        on_all_threads(2, lambda i: huge * huge if i == 1 else None)


def test_helpers_do_not_hold_the_context_of_the_caller(no_collector):
    variable, a = contextvars.ContextVar("variable"), np.ones(5)
    alive = weakref.ref(a)
    token = variable.set(a)
    on_all_threads(3)
    variable.reset(token)
    del a, token
    end = time.monotonic() + 10
    while alive() is not None and time.monotonic() < end:  # the helpers are about to leave it
        time.sleep(0.001)
    assert alive() is None


def test_the_settings_of_the_caller_stay():
    set_threads(2)
    x = np.random.default_rng(3).standard_normal((1100, 1000)).astype("float32")
    norm = LayerNorm.init(1000, compute="float32")
    with np.errstate(over="raise", under="warn"):
        np.setbufsize(2048)
        before = np.geterr(), np.getbufsize()
        for rows in (x, x[:4], x[:4]):  # by threads, and small arrays
            norm.backward(rows, norm.forward(rows)[1])
        assert (np.geterr(), np.getbufsize()) == before


def test_a_setting_that_work_changes_stays_within_it():
    before = np.geterr()
    on_all_threads(2, lambda i: np.seterr(all="raise"))
    assert np.geterr() == before
    seen = []
    on_all_threads(2, lambda i: seen.append(np.geterr()))
    assert seen == [before] * 2


@pytest.mark.parametrize("n", [1, 2, 17, np.int64(3)])
def test_the_number_of_threads_can_be_set(n):
    set_threads(n)
    assert get_threads() == n
    set_threads(None)
    assert get_threads() == default_threads()


@pytest.mark.parametrize("n", [0, -1, True, False, 1.5, 2.0, "2", np.float64(2)], ids=repr)
def test_another_number_of_threads_is_refused(n):
    set_threads(3)
    with pytest.raises(ValueError, match=r"^set_threads: n is .*\. It must be an integer, 1 or more, or None"):
        set_threads(n)
    assert get_threads() == 3


def test_the_environment_says_how_many_threads():
    said = program("from npnorm.threads import get_threads; print(get_threads())", NPNORM_THREADS="3", PMI_RANK="0")
    assert said.split() == ["3"]


@pytest.mark.parametrize("bad", ["0", "-1", "1.5", "two", "", " 2"])
def test_a_bad_number_in_the_environment_is_refused(bad, monkeypatch):
    monkeypatch.setenv("NPNORM_THREADS", bad)
    with pytest.raises(ValueError, match=rf"^NPNORM_THREADS is '{bad}'\. It must be an integer, 1 or more\.$"):
        get_threads()
    set_threads(2)  # comes before the environment
    assert get_threads() == 2


@pytest.mark.parametrize("launcher", ["PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"])
def test_a_rank_of_an_mpi_job_takes_one_thread(launcher, monkeypatch):
    monkeypatch.delenv("NPNORM_THREADS", raising=False)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert default_threads() == 3
    monkeypatch.setenv(launcher, "0")
    assert default_threads() == 1
    monkeypatch.setenv("NPNORM_THREADS", "2")
    assert default_threads() == 2


def take(name, shape, dtype="float64"):
    """Return scratch memory that is lent no more."""
    with scratch() as memory:
        return memory.empty(name, shape, dtype)


def test_scratch_is_the_same_memory_at_each_use():
    a, b = take("a", (3, 4), "float32"), take("a", (2, 5), np.float32)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((3, 4), (2, 5), np.float32, np.float32)
    assert a.ctypes.data == b.ctypes.data


def test_scratch_grows():
    small, large = take("grows", (3,)), take("grows", (1000,))
    large[...] = 7.0
    assert large.shape == (1000,)
    assert not np.shares_memory(small, large)
    assert take("grows", (5,)).tolist() == [7.0] * 5


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_scratch_may_have_any_shape(shape):
    assert take("any", shape).shape == shape


def test_scratch_of_another_name_or_dtype_is_other_memory():
    with scratch() as memory:
        kept = [memory.empty(*what) for what in (("a", (9,), "f4"), ("b", (9,), "f4"), ("a", (9,), "f8"))]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(kept) for b in kept[:i])


def test_scratch_of_another_thread_is_other_memory():
    kept = []
    on_all_threads(3, lambda i: kept.append(take("of a thread", (9,))))
    assert not any(np.shares_memory(a, b) for i, a in enumerate(kept) for b in kept[:i])


def test_scratch_that_is_lent_is_not_lent_again():
    with scratch() as outer:
        a = outer.empty("a", (9,), "float64")
        with scratch() as inner, scratch() as innermost:
            kept = [a, *(memory.empty("a", (9,), "float64") for memory in (inner, innermost))]
        kept.append(take("a", (9,)))
        assert not any(np.shares_memory(a, b) for b in kept[1:])
        assert not np.shares_memory(kept[1], kept[2])
    assert take("a", (9,)).ctypes.data == a.ctypes.data  # it is the outermost that is kept


def test_scratch_that_was_lent_within_another_is_not_kept(no_collector):
    with scratch():
        with scratch():
            memory = weakref.ref(take("a", (9,)).base)
    assert memory() is None


def test_scratch_whose_uses_end_in_any_order_is_not_lent_twice():
    first, second = scratch(), scratch()
    a, b = first.__enter__().empty("a", (9,), "float64"), second.__enter__().empty("a", (9,), "float64")
    first.__exit__(None, None, None)
    with scratch() as third:
        c = third.empty("a", (9,), "float64")
        second.__exit__(None, None, None)
        with scratch() as fourth:
            d = fourth.empty("a", (9,), "float64")
            assert not np.shares_memory(c, d)
        assert not np.shares_memory(b, c)
    assert not np.shares_memory(a, b)


def test_scratch_is_lent_again_after_an_error():
    a = take("a", (9,))
    with pytest.raises(ValueError, match="no"), scratch():
        raise ValueError("no")
    assert take("a", (9,)).ctypes.data == a.ctypes.data


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_a_signal_handler_does_not_overwrite_the_scratch_of_what_it_interrupts():
    handled = wrong = 0

    def evaluate(value):
        with scratch() as memory:
            a = memory.empty("a", (1000,), "float64")
            a[...] = value
            for _ in range(20):
                a += 1.0
            return bool((a != value + 20.0).any())

    def handler(*_):
        nonlocal handled, wrong
        handled, wrong = handled + 1, wrong + evaluate(100.0)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        end = time.monotonic() + 10
        while handled < 300 and time.monotonic() < end:
            wrong += evaluate(0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert wrong == 0
    assert handled >= 300


def test_scratch_that_is_kept_has_a_bound():
    tracemalloc.start()
    try:
        for shape in [(KEPT // 8 + 1,), (10 * KEPT,)]:  # too large
            take("large", shape)
        assert tracemalloc.get_traced_memory()[0] < KEPT // 8
        for dtype in ("float32", "float64"):
            for i in range(20):
                take(f"part {i}", (KEPT // 64,), dtype)
                assert tracemalloc.get_traced_memory()[0] < KEPT + KEPT // 8
        assert tracemalloc.get_traced_memory()[0] > KEPT // 8
    finally:
        tracemalloc.stop()
    a = take("of the bound", (KEPT // 8,))
    assert a.ctypes.data == take("of the bound", (KEPT // 8,)).ctypes.data


def test_threads_do_not_mix_their_scratch():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((16, 8, 100, 100)).astype("float32")
    norm = GroupNorm(4, *rng.standard_normal((2, 8)).astype("float32"))
    found = []
    for threads in (1, 3):
        set_threads(threads)
        y, saved = norm.forward(x)
        dx, grads = norm.backward(x[::-1].copy(), saved)
        found.append({"y": y, "dx": dx, **grads})
    same_bits(found[1], found[0])
