"""Text as a data set of characters.

The default text needs no download: the topics of `help()`, which are parts of the Python language reference and come
with every Python (`pydoc_data.topics`; Python Software Foundation License). It differs a little between versions.
"""

import math
from pathlib import Path

import numpy as np


def language_reference() -> str:
    """Return the topics of Python's own language reference, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read(path: str | Path) -> str:
    """Return the text of a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not UTF-8 text ({problem}). Convert it first, for example with iconv.") from None


class Characters:
    """The vocabulary of a text: its distinct characters, in the order of their code points.

    Parameters
    ----------
    text : str

    Attributes
    ----------
    codes : array of uint32, shape (size,)
    size : int

    Examples
    --------
    >>> letters = Characters("banana")
    >>> letters.encode("nab")
    array([2, 0, 1])
    >>> letters.decode(np.array([2, 0, 1]))
    'nab'
    """

    def __init__(self, text: str) -> None:
        self.codes = np.unique(_code_points(text))
        self.size = len(self.codes)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the characters, from 0 to size - 1."""
        codes = _code_points(text)
        ids = np.searchsorted(self.codes, codes)
        known = self.codes[np.minimum(ids, self.size - 1)] == codes
        if not known.all():
            strange = sorted({chr(code) for code in codes[~known]})
            raise ValueError(f"Characters: {strange} are not among the {self.size} characters of the vocabulary.")
        return ids

    def decode(self, ids: np.ndarray) -> str:
        """Return the characters of the ids."""
        return "".join(map(chr, self.codes[ids]))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def unigram_entropy(ids: np.ndarray) -> float:
    """Return the entropy of the frequencies of the ids, in nats: the loss of the best model without context.

    Examples
    --------
    >>> round(unigram_entropy(np.array([0, 1, 0, 1])), 4)  # log 2
    0.6931
    """
    p = np.unique(ids, return_counts=True)[1] / len(ids)
    return float(np.sum(p * -np.log(p)))


def split(ids: np.ndarray, length: int, held_out: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Return the first part, to train on, and the last, to judge by; each holds at least one window of `length`."""
    cut = len(ids) - int(len(ids) * held_out)
    if len(ids) - cut <= length:
        need = math.ceil((length + 1) / held_out)
        raise ValueError(
            f"The text has {len(ids)} characters; windows of {length} need at least {need}. "
            "Take a longer text or a smaller context."
        )
    return ids[:cut], ids[cut:]


def batch(ids: np.ndarray, rows: int, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return `rows` random windows and, as targets, the same windows one character later: (rows, length) each."""
    if len(ids) <= length:
        raise ValueError(f"batch: {len(ids)} ids hold no window of {length} and its next id.")
    starts = rng.integers(0, len(ids) - length, rows)
    windows = ids[starts[:, None] + np.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]
