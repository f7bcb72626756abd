"""How the rows of an array are evaluated: at which level, and how many."""

import copy
from collections import Counter
from typing import Any

import numpy as np

from npnorm.arrays import Array
from npnorm.engine.guards import Guards, Lost
from npnorm.engine.levels import Level, Levels


class _Counting(Guards):
    """Counts the rows that lost digits, by the name of what evaluates them again."""

    def __init__(self, level: Level, eps: float, again: str, count: Counter[str]) -> None:
        super().__init__(level.work, level.centring, eps)
        self.again, self.count = again, count

    def lost_forward(self, *given: Any) -> Any:
        lost = super().lost_forward(*given)
        self._add(self.again, lost)
        return lost

    def lost_backward(self, *given: Any) -> Lost | None:
        lost = super().lost_backward(*given)
        if lost is not None:
            self._add(self.again, lost.rows)
            self._add("dx again", lost.dx)
        return lost

    def _add(self, name: str, lost: Any) -> None:
        if lost is not None:
            self.count[name] += int(np.sum(lost))


class _Levels(Levels):
    """Levels whose counts leave out rows of which the statistics alone are wanted again."""

    count: Counter[str]

    def statistics(self, x: np.ndarray) -> tuple[Any, ...]:
        before = dict(self.count)
        result = super().statistics(x)
        self.count.clear()
        self.count.update(before)
        return result


def explain(norm: Any, x: Array, dy: Array | None = None) -> dict[str, dict[str, int]]:
    """Return how many rows of x are evaluated at each level, forward and, with a dy, backward.

    The levels are "float32" or "float64", with ", mean folded" where x - mean(x) is never formed; "float64, mean twice"
    for rows whose mean is far from zero; "exact"; and backward "dx again", for rows of which dx alone is found by
    another way, since it cancels. A row that lost digits at one level is counted at the next one as well.

    Parameters
    ----------
    norm : a norm of one array
    x, dy : arrays

    Examples
    --------
    >>> from npnorm import LayerNorm
    >>> x = np.random.default_rng(0).standard_normal((6, 64)).astype("float32")
    >>> x[2] += 1000  # a mean far from zero
    >>> explain(LayerNorm(), x)
    {'forward': {'float64': 6, 'float64, mean twice': 1}}
    """
    count: Counter[str] = Counter()
    rows = copy.copy(norm.rows)
    rows.forget()
    rows.levels = levels = _Levels(rows.exact, rows.compute)
    levels.count = count
    names = [work if centring == "once" else f"{work}, mean {centring}" for work, centring, _ in levels.levels]
    again = [*names[1:], "exact"]
    guards = [_Counting(level, levels.eps, name, count) for level, name in zip(levels.levels, again, strict=True)]
    levels.levels = [level._replace(guards=guard) for level, guard in zip(levels.levels, guards, strict=True)]

    def counted(first: int | None, evaluate: Any) -> tuple[dict[str, int], Any]:
        count.clear()
        count["exact" if first is None else names[first]] = rows.layout.to_rows(x).shape[0]
        result = evaluate()
        return dict(count), result

    found = {}
    found["forward"], (_, *saved) = counted(rows.level(x, norm.params), lambda: rows.forward(x, norm.params))
    if dy is not None:
        first = rows.level(x, norm.params, dy) if saved[1] is None else None
        found["backward"], _ = counted(first, lambda: rows.backward(dy, x, norm.params, *saved))
    return found
