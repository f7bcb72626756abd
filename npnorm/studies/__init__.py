"""The experiments. Each is a module with a command, and writes a page of the documentation.

    python -m npnorm.studies.accuracy --write docs/accuracy.md    npnorm and other libraries beside exact arithmetic

Nothing in the rest of the package imports a study.
"""
