"""Numbers to text, here and nowhere else in the dashboard. Three significant digits unless said otherwise."""

import math

BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
MIB = 2**20
UNKNOWN = "unknown"


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and no exponent: 61.2, 0.00123, 1,230."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else UNKNOWN
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    # 9.996 with three digits is 10.0, not 10.00.
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(round(value, decimals)))))
    return f"{round(value, decimals):,.{decimals}f}"


def format_bytes(value: float | None) -> str:
    """Bytes in the binary unit that suits: 61.2 MiB."""
    if value is None:
        return UNKNOWN
    divisor, unit = byte_unit(value)
    return f"{significant(value / divisor)} {unit}"


def byte_unit(largest: float) -> tuple[int, str]:
    """(divisor, unit) in which `largest` reads well; one unit for a whole axis."""
    power = 0
    while power < len(BINARY_UNITS) - 1 and abs(largest) / 1024**power >= 999.5:
        power += 1
    return 1024**power, BINARY_UNITS[power]


def format_integer(value: float | None) -> str:
    """The exact integer, thousands separated: 162,816."""
    return UNKNOWN if value is None else f"{round(value):,}"


def format_count(value: float | None) -> str:
    """A count for reading: exact below a million, then 3.15 M, 8.03 B."""
    if value is None:
        return UNKNOWN
    for divisor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if abs(value) >= divisor * 0.9995:
            return f"{significant(value / divisor)} {unit}"
    return format_integer(value)


def format_percent(value: float | None) -> str:
    """A percentage given in percent: 5.17 %."""
    return UNKNOWN if value is None else f"{significant(value)} %"


def format_number(value: float | None) -> str:
    """A setting as short as it is exact: 16, 0.003, 2.5."""
    return UNKNOWN if value is None else f"{value:.10g}"


def format_ratio(value: float) -> str:
    """A scaling: 2.0, 0.125, 1.41."""
    text = significant(value)
    if "." in text:
        text = text.rstrip("0")
        return text + "0" if text.endswith(".") else text
    return text + ".0" if abs(value) < 100 else text


def format_loss(value: float | None) -> str:
    """A loss with two decimals, more where it is small: 3.94, 0.0123."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return f"{value:.2f}" if abs(value) >= 0.1 else significant(value)


def format_duration(seconds: float | None) -> str:
    """41 s, 2 min 5 s, 1 h 3 min."""
    if seconds is None or math.isnan(seconds):
        return UNKNOWN
    if 0 < seconds < 0.0995:
        return f"{significant(1000 * seconds)} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def format_times(value: float) -> str:
    """A factor: 19 times, 1.9 times."""
    return f"{significant(value, 2)} times"


def plural(count: int, word: str) -> str:
    """1 row, 2 rows, 1,204 rows."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def format_flops(value: float) -> str:
    """Floating-point operations: 1.2 TFLOP, 980 MFLOP."""
    for divisor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * divisor:
            return f"{significant(value / divisor)} {unit}FLOP"
    return f"{significant(value)} FLOP"


def format_watt_hours(value: float) -> str:
    """Energy: 12.3 Wh, 4.5 kWh."""
    for divisor, unit in ((1e6, "MWh"), (1e3, "kWh"), (1.0, "Wh")):
        if value >= 0.9995 * divisor:
            return f"{significant(value / divisor)} {unit}"
    return f"{significant(1000 * value)} mWh"
