"""Layer normalization of features that are split over the ranks: two all-reduces forward, one backward.

    mpirun -n 4 python mpi_examples/layer_norm_tensor_parallel.py

Each rank holds its part of every row. The mean of the whole row is one sum over the ranks. The mean square of what is
left cannot be known before, so it is a second one. Backward needs two means, but they do not wait for each other: they
share one message. Compare rms_norm_tensor_parallel.py, which has no mean to wait for.
"""

import numpy as np
from against_serial import Table, count

from npnorm import LayerNorm
from npnorm.mpi import Ranks, run

ROWS, FEATURES = 512, 768


def main(group: Ranks) -> None:
    """Run the norm whole, and split over the ranks; show the messages and the differences."""
    rng = np.random.default_rng(0)  # the same arrays on every rank
    x, dy = rng.normal(size=(2, ROWS, FEATURES))
    weight, bias = rng.normal(size=(2, FEATURES))

    serial = LayerNorm(weight, bias)
    y, saved = serial.forward(x)
    dx, grads = serial.backward(dy, saved)

    def shard(whole: np.ndarray) -> np.ndarray:
        return group.shard(whole, axis=-1)

    table = Table(group, f"LayerNorm of {FEATURES} features on {count(group.size)}; {ROWS} rows, {x.dtype}")
    norm = LayerNorm(shard(weight), shard(bias), group=group)
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
