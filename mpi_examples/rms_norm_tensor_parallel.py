"""Root mean square normalization of features that are split over the ranks: one all-reduce forward, one backward.

    mpirun -n 4 python mpi_examples/rms_norm_tensor_parallel.py

Each rank holds its part of every row. It sums its squares, and one sum over the ranks makes them the mean square of the
whole row. Backward needs one mean more, and so one sum. Compare layer_norm_tensor_parallel.py: two sums forward.
"""

import numpy as np
from against_serial import Table, count

from npnorm import RMSNorm
from npnorm.mpi import Ranks, run

ROWS, FEATURES = 512, 768


def main(group: Ranks) -> None:
    """Run the norm whole, and split over the ranks; show the messages and the differences."""
    rng = np.random.default_rng(0)  # the same arrays on every rank
    x, dy = rng.normal(size=(2, ROWS, FEATURES))
    weight = rng.normal(size=FEATURES)

    serial = RMSNorm(weight)
    y, saved = serial.forward(x)
    dx, grads = serial.backward(dy, saved)

    def shard(whole: np.ndarray) -> np.ndarray:
        return group.shard(whole, axis=-1)

    table = Table(group, f"RMSNorm of {FEATURES} features on {count(group.size)}; {ROWS} rows, {x.dtype}")
    norm = RMSNorm(shard(weight), group=group)
    with table.step("forward"):
        my_y, saved = norm.forward(shard(x))
    with table.step("backward"):
        my_dx, my_grads = norm.backward(shard(dy), saved)
    table.compare("forward", y=(my_y, shard(y)))
    table.compare("backward", dx=(my_dx, shard(dx)))
    table.compare("backward", **{f"d{name}": (my_grads[name], shard(grads[name])) for name in grads})
    table.finish()


if __name__ == "__main__":
    run(main)
