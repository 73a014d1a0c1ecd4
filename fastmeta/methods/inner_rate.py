"""The rate of a method's inner step, which a schedule may move."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastmeta import checks
from fastmeta.directions import LookAhead


class InnerRate:
    """Eta of the derivative and, where there is one, of the look-ahead: one number of the method."""

    if TYPE_CHECKING:

        def __get__(self, method: object, owner: type) -> float: ...

    else:

        def __get__(self, method: Any, owner: type) -> Any:
            return self if method is None else method.derivative.rate

    def __set__(self, method: Any, value: float) -> None:
        method.derivative = replace(method.derivative, rate=checks.number(value, "rate", low=0.0))
        if isinstance(method.direction, LookAhead):
            method.direction.rate = value
