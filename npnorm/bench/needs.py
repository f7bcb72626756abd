"""What the speed tables import beside NumPy, and what they say where that is missing."""

import importlib.util
import sys
from typing import Any


class Missing(ImportError):
    """A package that is asked for is not installed."""


def need(module: str) -> Any:
    """Import a module by its name, and return the package that it is in.

    Raises
    ------
    Missing
        With the line that installs it.

    Examples
    --------
    >>> need("numpy.linalg").__name__
    'numpy'
    """
    package = module.split(".")[0]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # it is there, but something that it needs is not
        raise Missing(
            f"{package} is not installed. torch and matplotlib come with: pip install 'npnorm[bench]'"
        ) from None
    return sys.modules[package]


def installed(package: str) -> bool:
    """Return whether a package can be imported.

    Examples
    --------
    >>> installed("numpy"), installed("no_such_package")
    (True, False)
    """
    return importlib.util.find_spec(package) is not None
