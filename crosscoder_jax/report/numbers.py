"""Write numbers the same way everywhere on the page."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A number as text, and the reason when there is none."""

    text: str
    reason: str = ""


def missing(reason: str) -> Figure:
    """Write a number that does not exist."""
    return Figure("n/a", reason)


def count(value: float | None, reason: str = "not counted") -> Figure:
    """Write a whole number with thousands separators."""
    return missing(reason) if value is None or not math.isfinite(value) else Figure(f"{round(value):,}")


def share(value: float | None, reason: str = "not measured") -> Figure:
    """Write a share in 0..1 as a percentage, finer below 1 % and never rounded to 0 or 100."""
    if value is None or not math.isfinite(value):
        return missing(reason)
    percent = 100 * value
    if percent in (0, 100):
        return Figure(f"{percent:.0f} %")
    if 99.95 <= percent < 100:
        return Figure("> 99.9 %")
    if 0 < percent < 0.001:
        return Figure("< 0.001 %")
    is_tiny = abs(percent) < 0.995
    return Figure(_signed(f"{percent:.2g} %" if is_tiny else f"{percent:.1f} %"))


def decimal(value: float | None, digits: int = 2, reason: str = "not measured") -> Figure:
    """Write a number with a fixed count of decimals."""
    return (
        missing(reason)
        if value is None or not math.isfinite(value)
        else Figure(_signed(f"{value:.{digits}f}"))
    )


def significant(value: float | None, digits: int = 3, reason: str = "not measured") -> Figure:
    """Write a positive quantity of unknown magnitude with a few significant digits."""
    if value is None or not math.isfinite(value):
        return missing(reason)
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    if -4 < magnitude < 6:
        return Figure(_signed(f"{value:,.{max(0, digits - 1 - magnitude)}f}"))
    return Figure(_signed(f"{value:.{digits - 1}e}"))


def interval(
    value: float | None, half: float | None, digits: int = 2, reason: str = "not measured"
) -> Figure:
    """Write an estimate with the half width of its 95 % interval."""
    if value is None or not math.isfinite(value):
        return missing(reason)
    if half is None or not math.isfinite(half):
        return Figure(f"{_signed(f'{value:.{digits}f}')} ± n/a", "its standard error could not be estimated")
    smallest = 10**-digits
    width = f"{half:.{digits}f}" if half >= 0.5 * smallest else f"<\N{NO-BREAK SPACE}{smallest:.{digits}f}"
    return Figure(f"{_signed(f'{value:.{digits}f}')} ± {width}")


def plural(number: int, word: str, many: str | None = None) -> str:
    """Write a count with its noun in the right number."""
    return f"{number:,} {word if number == 1 else many or word + 's'}"


def _signed(text: str) -> str:
    is_zero = not text.strip("-0.,")
    return text.lstrip("-") if is_zero else text.replace("-", "\N{MINUS SIGN}", 1)
