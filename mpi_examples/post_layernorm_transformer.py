"""The original transformer, split over the ranks: layer normalization after each residual connection.

    mpirun -n 4 python mpi_examples/post_layernorm_transformer.py

y = norm(x + f(x)), with GELU, learned positions and biases. First a small model is held against the serial one, to the
last digits of float64; then a larger one learns real text, character by character. `--help` lists the settings.
"""

from transformer_check import check_transformer

from npnorm.config import Config
from npnorm.mpi import Ranks, run
from npnorm.training.program import arguments, train_on_text


def main(group: Ranks) -> None:
    """Check against serial, then train."""
    settings = arguments(group, description=__doc__.splitlines()[0])
    check_transformer(group, Config.original)
    train_on_text(group, Config.original, settings)


if __name__ == "__main__":
    run(main)
