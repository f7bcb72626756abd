"""The counter of MPI calls against calls made by hand: 12 numbers of 8 bytes are 96 bytes, however they travel."""

import sys

import numpy as np
import pytest

from tests.mpi import pmpi
from tests.mpi.pmpi import counting


@pytest.mark.mpi(counted=True)
@pytest.mark.parametrize("dtype", ["float64", "float32", "int8"])
def test_allreduce(comm, dtype):
    x = np.ones(12, dtype)
    y = np.empty_like(x)
    with counting() as calls:
        comm.Allreduce(x, y)
    assert calls == {"Allreduce": (1, x.nbytes)}
    assert (y == comm.size).all()


@pytest.mark.mpi(ranks=(2, 4), counted=True)
@pytest.mark.parametrize("name", ["Allgather", "Gather", "Iallgather"])
def test_gathering(comm, name):
    x, whole = np.ones(12), np.empty((comm.size, 12))
    with counting() as calls:
        request = getattr(comm, name)(x, whole)
        if request:
            request.Wait()
    assert calls == {name: (1, 96)}


@pytest.mark.mpi(ranks=(2, 4), counted=True)
@pytest.mark.parametrize("name", ["Alltoall", "Reduce_scatter_block"])
def test_one_share_is_counted(comm, name):
    whole = np.ones((comm.size, 12))
    received = np.empty_like(whole) if name == "Alltoall" else np.empty(12)
    with counting() as calls:
        getattr(comm, name)(whole, received)
    assert calls == {name: (1, 96)}


@pytest.mark.mpi(ranks=2, counted=True)
def test_scatter_is_of_the_root(comm):
    whole = np.ones((2, 12)) if comm.rank == 0 else None
    with counting() as calls:
        comm.Scatter(whole, np.empty(12))
    assert calls == {"Scatter": (1, 96 if comm.rank == 0 else 0)}


@pytest.mark.mpi(ranks=3, counted=True)
def test_reduce_and_broadcast(comm):
    x, y = np.ones(12), np.empty(12)
    with counting() as calls:
        comm.Bcast(x, root=1)
        comm.Bcast(x[:3], root=2)
        comm.Ibcast(x).Wait()
        comm.Reduce(x, y)
        comm.Iallreduce(x, y).Wait()
        comm.Barrier()
    assert calls == {
        "Bcast": (2, 96 + 24),
        "Ibcast": (1, 96),
        "Reduce": (1, 96),
        "Iallreduce": (1, 96),
        "Barrier": (1, 0),
    }


@pytest.mark.mpi(ranks=2, counted=True)
def test_point_to_point(comm):
    other = 1 - comm.rank
    x, y = np.ones(12), np.empty(12)
    with counting() as calls:
        comm.Sendrecv(x, other, recvbuf=y, source=other)
        request = comm.Irecv(y, other)
        comm.Isend(x[:6], other).Wait()
        request.Wait()
        (comm.Send if comm.rank else comm.Recv)(x[:3], other)
    last = "Send" if comm.rank else "Recv"
    assert calls == {"Sendrecv": (1, 96), "Irecv": (1, 96), "Isend": (1, 48), last: (1, 24)}


@pytest.mark.mpi(ranks=2, counted=True)
def test_in_place_and_empty(comm):
    from mpi4py import MPI

    x = np.ones(12)
    with counting() as calls:
        comm.Allreduce(MPI.IN_PLACE, x)
        comm.Allreduce(x[:0], np.empty(0))
    assert calls == {"Allreduce": (2, 96)}


@pytest.mark.mpi(ranks=2, counted=True)
def test_pickled_objects_are_seen(comm):
    with counting() as calls:
        comm.bcast({"a": 1})
    assert calls["Bcast"][0] >= 1


@pytest.mark.mpi(ranks=2, counted=True)
def test_only_the_block_is_counted(comm):
    x, y = np.ones(12), np.empty(12)
    comm.Allreduce(x, y)
    with counting() as outer:
        comm.Allreduce(x, y)
        with counting() as inner:
            comm.Allreduce(x, y)
        with counting() as nothing:
            pass
    comm.Allreduce(x, y)
    assert (outer, inner, nothing) == ({"Allreduce": (2, 192)}, {"Allreduce": (1, 96)}, {})


def test_without_the_library():
    with pytest.raises(RuntimeError, match="counted=True"), counting():
        pass


def test_failed_build_tells_why():
    with pytest.raises(RuntimeError, match="failed:\nno header"):
        pmpi.call([sys.executable, "-c", "raise SystemExit('no header')"])
