"""Programs that interrupt `parallel_for`; `tests/test_threads.py` runs each in a process of its own, since it may hang.

Each checks that no helper is at work once a call has ended or was interrupted, and that later calls are right.
"""

import contextlib
import itertools
import os
import random
import signal
import sys
import threading
import time

from npnorm import threads
from npnorm.threads import parallel_for, scratch

MAIN = threading.main_thread().ident


def interrupt():
    """Send an interrupt to the main thread, whatever it waits for."""
    signal.pthread_kill(MAIN, signal.SIGINT)


def on_all_threads(n, work=lambda i: None):
    """Call `work` on each of n threads; they wait for each other first."""
    together = threading.Barrier(n)

    def wait_and_work(i):
        together.wait(timeout=10)
        work(i)

    parallel_for(wait_and_work, n, n)


def check_later_calls(n):
    """Check that all threads take part in a call, which waits for the slowest of them."""
    for slowest in range(n):
        ended = []
        on_all_threads(n, lambda i, slowest=slowest, ended=ended: (time.sleep(0.01 * (i == slowest)), ended.append(i)))
        assert sorted(ended) == list(range(n)), f"{len(ended)} of {n} calls have ended"


class Work:
    """Slow work that says on which thread a call begins, and which ones end."""

    def __init__(self, seconds):
        self.seconds, self.begun, self.ended = seconds, {}, set()

    def __call__(self, i):
        self.begun[i] = threading.get_ident()
        time.sleep(self.seconds())
        self.ended.add(i)

    def check(self, count=None):
        """Check that no helper is within it, and that all calls have ended if `count` is given."""
        by_helpers = {i for i, thread in self.begun.items() if thread != MAIN}
        assert by_helpers <= self.ended, f"{len(by_helpers - self.ended)} calls have not ended"
        assert count is None or self.ended == set(range(count)), f"{len(self.ended)} of {count} calls have ended"


class Interrupted:
    """A context in which KeyboardInterrupt is raised at the k-th step, an opcode or a line, of `npnorm/threads.py`."""

    def __init__(self, k, kind="opcode"):
        self.left, self.kind = k, kind

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != threads.__file__:
            return None
        frame.f_trace_opcodes = self.kind == "opcode"
        if event == self.kind:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        sys._getframe().f_trace_opcodes = self.kind == "opcode"  # Python 3.12 must know of it now
        sys.settrace(self.trace)

    def __exit__(self, *_):
        sys.settrace(None)


def while_helpers_work(n):
    """One helper interrupts the caller, which waits; the others take longer, or less long."""
    for k in range(3 * (n - 1)):
        ended, order = [], itertools.count()

        def work(_, ended=ended, order=order, sender=k % (n - 1)):
            if threading.get_ident() != MAIN:
                place = next(order)
                time.sleep(0.005 + 0.01 * place)
                if place == sender:
                    interrupt()
                    time.sleep(0.005)
                ended.append(place)

        with contextlib.suppress(KeyboardInterrupt):
            on_all_threads(n, work)
            raise AssertionError("the interrupt is lost")
        assert sorted(ended) == list(range(n - 1)), f"{len(ended)} of {n - 1} helpers have ended"
        check_later_calls(n)


def at_random(n, seed):
    """Many calls, interrupted once or twice each at any time."""
    rng, armed, stop, interrupted = random.Random(seed), 0, False, 0

    def on_interrupt(*_):
        nonlocal armed
        if armed:
            armed -= 1
            raise KeyboardInterrupt

    def send():
        pauses = random.Random(seed + 1)
        while not stop:
            time.sleep(pauses.uniform(0.0002, 0.004))
            interrupt()

    signal.signal(signal.SIGINT, on_interrupt)
    check_later_calls(n)  # all helpers are there
    sender = threading.Thread(target=send)
    sender.start()
    for call in range(400):
        count, work = rng.randint(2, 12), Work(lambda: random.uniform(0, 0.001))
        try:
            try:
                armed = 1 + call % 2
                parallel_for(work, count, n)
            finally:
                armed = 0
        except KeyboardInterrupt:
            interrupted += 1
            work.check()
        else:
            work.check(count)
    stop = True
    sender.join()
    assert 40 < interrupted < 400, interrupted
    assert sum(thread.name == "npnorm" for thread in threading.enumerate()) == n - 1
    check_later_calls(n)


def at_each_step(n):
    """A call is interrupted at each step of the interpreter in turn."""
    on_all_threads(n)
    k = completed = 0
    while completed < 5:  # the caller makes more calls of work, and so more steps, now and then
        k, work = k + 1, Work(lambda: 0.0005)
        try:
            with Interrupted(k):
                parallel_for(work, 2 * n, n)
            work.check(2 * n)
            completed += 1
        except KeyboardInterrupt:
            work.check()
    check_later_calls(n)
    assert k > 100, f"{k} steps"


def at_each_step_of_the_first_call(n):
    """The call that starts the threads is interrupted at each line in turn, each time in a forked process."""
    for k in itertools.count(1):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            code = 1
            try:
                with Interrupted(k, "line"):
                    parallel_for(Work(lambda: 0.0005), n, n)
                code = 2
            except KeyboardInterrupt:
                check_later_calls(n)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        if status == 2 << 8:
            break
        assert status == 0, f"interrupted at line {k}: {status}"
    assert k > 30, f"{k} lines"


def of_slow_helpers(n):
    """Helpers are slow in all that they do before and after work, so that a call meets what is left of the last."""

    def slow(frame, event, _):
        if frame.f_code.co_filename != threads.__file__:
            return None
        time.sleep(0.002)
        return slow

    threading.settrace(slow)
    on_all_threads(n)
    threading.settrace(None)
    ended = []

    def work(i):
        if threading.get_ident() != MAIN:
            time.sleep(0.05)
            interrupt()
            time.sleep(0.05)
            ended.append(i)

    with contextlib.suppress(KeyboardInterrupt):
        on_all_threads(n, work)
        raise AssertionError("the interrupt is lost")
    assert len(ended) == n - 1, f"{len(ended)} of {n - 1} helpers have ended"
    for count in range(2, 20):  # the caller ends while the helpers are at another step each time
        time.sleep(0.05)
        slept = Work(lambda: 0.001)
        parallel_for(slept, count, n)
        slept.check(count)


def in_a_handler(n):
    """A signal handler makes a call of its own while the caller is at work, or waits for helpers."""
    handled = []

    def handler(*_):
        work = Work(lambda: 0.0)
        parallel_for(work, 10, n)
        work.check(10)
        handled.append(work)

    signal.signal(signal.SIGINT, handler)
    for waits in (False, True):
        work = Work(lambda: 0.001)

        def send(i, work=work, waits=waits):
            work(i)
            if (threading.get_ident() == MAIN) != waits:
                interrupt()
                work(i + 100)
                work(i + 200)

        on_all_threads(n, send)
        assert len(work.ended) == n + 2 * (n - 1 if waits else 1)
    assert len(handled) >= 2


def in_scratch():
    """A use of scratch memory is interrupted at each step: what is lent is never lent again, and memory is kept."""
    for k in itertools.count(1):
        try:
            with Interrupted(k), scratch() as outer:
                a = outer.empty("a", (5,), "float32")
                sys.settrace(None)
                with scratch() as inner:
                    assert inner is not outer
            break
        except KeyboardInterrupt:
            addresses = set()
            for _ in range(3):
                with scratch() as memory:
                    addresses.add(memory.empty("a", (5,), "float32").ctypes.data)
            assert len(addresses) == 1
    assert k > 30, f"{k} steps"
    assert a.shape == (5,)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell has it ignored, in the background
    globals()[sys.argv[1]](*map(int, sys.argv[2:]))
