"""The experiments: what is claimed about normalization, run and measured.

    python -m npnorm.studies                       the list
    python -m npnorm.studies vanishing --quick     one of them, in seconds
    python -m npnorm.studies vanishing             in full: a table, a verdict on each claim, numbers and a picture

`study.py` is what they share; each of the others is one study, and shows how the next is written. Nothing in the rest
of the package imports a study.
"""

STUDIES = (
    "vanishing",
    "norm_comparison",
    "pre_vs_post",
    "outliers",
    "invariance",
    "partial",
    "recurrent",
    "convolutional",
    "batch_size",
    "speed",
    "accuracy",
    "half_precision",
    "communication",
)
"""By the name of their file, in the order of reading."""
