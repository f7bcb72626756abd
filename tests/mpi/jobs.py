"""A program whose ranks fail in the way that its argument names; test_run.py starts it under mpirun."""

import sys
import time

import numpy as np

from npnorm import LayerNorm
from npnorm.mpi import run


def main(group):
    last = group.rank == group.size - 1
    match sys.argv[1]:
        case "succeed":
            print(f"sum {group.sum(np.ones(1))[0]:g}") if last else group.sum(np.ones(1))
        case "raise on one":
            if last:
                raise KeyError("only here")
            group.sum(np.ones(1))
        case "raise on all":
            raise KeyError("everywhere")
        case "exit on one":
            if last:
                sys.exit(3)
            group.sum(np.ones(1))
        case "exit with a message on one":
            if last:
                sys.exit("the file is missing")
            group.sum(np.ones(1))
        case "exit on all":
            sys.exit(4)
        case "exit as if well on one":
            if last:
                sys.exit(0)
            group.sum(np.ones(1))
        case "return early on one":
            if not last:
                group.sum(np.ones(1))
        case "raise while another has returned":
            if last:
                time.sleep(0.2)
                raise KeyError("late")
        case "other collectives":
            group.max(np.ones(1)) if last else group.sum(np.ones(1))
        case "shards that disagree":
            LayerNorm(np.ones(4 + last), group=group)
        case "a width that the ranks do not divide":
            group.shard(np.ones(7), 0)
        case "blas threads":
            from threadpoolctl import threadpool_info

            threads = {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}
            print(f"threads {threads}") if last else None


if __name__ == "__main__":
    run(main)
