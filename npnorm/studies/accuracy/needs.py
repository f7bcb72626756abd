"""What the study imports beside NumPy, and what it says where that is missing."""

import importlib
from typing import Any


class Missing(ImportError):
    """A package that the study needs is not installed."""


def need(module: str) -> Any:
    """Import a module by its name.

    Raises
    ------
    Missing
        With the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name != package:
            raise  # it is there, but something that it needs is not
        raise Missing(
            f"{package} is not installed. The study's packages come with: pip install 'npnorm[accuracy]'"
        ) from None
