"""The check of shapes that conftest.py puts around every function of the tensor modules."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

NUMBERS = BeartypeConf(is_pep484_tower=True)
"""An int is a float here too, as it is to mypy."""


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, checked at each call; one that returns `Self` is left as it is.

    The import hook decorates the functions of a class one by one, where beartype cannot know Self.
    """
    try:
        return beartype(function, conf=NUMBERS)
    except BeartypeDecorHintPep673Exception:
        return function
