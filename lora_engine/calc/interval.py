"""The interval around a prediction, taken from how far earlier predictions were off.

Split conformal prediction (Vovk et al. 2005; Lei et al. 2018, section 2): of n earlier errors and one to come, each
order is as likely as any other, so the k-th smallest absolute error covers the next one with at least k / (n + 1).
It asks that runs be alike, not that errors follow any distribution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_engine.calc.memory import MemoryEstimate

LEVEL_PERCENT = 95
MIN_RUNS = 8  # n errors never cover more than n / (n + 1): below this the promise is too weak to print


@dataclass(frozen=True)
class Interval:
    """The measurement lies from `low_percent` to `high_percent` of the prediction away from it (0 is the prediction
    itself) with at least `level_percent`; `count` runs say so."""

    level_percent: int
    low_percent: float
    high_percent: float
    count: int

    def bounds(self, peak_bytes: int) -> tuple[int, int]:
        """(low, high) bytes around a predicted peak; never below nothing."""
        low, high = (peak_bytes * (100 + percent) / 100 for percent in (self.low_percent, self.high_percent))
        return max(0, math.floor(low)), math.ceil(high)


def calibrate(errors: Sequence[float]) -> Interval | None:
    """The interval for LEVEL_PERCENT, or for what so many runs can promise; None for fewer than MIN_RUNS.

    `errors`: measured minus predicted, in percent of the predicted. Those that are no numbers are left out."""
    sizes = sorted(abs(error) for error in errors if math.isfinite(error))
    count = len(sizes)
    if count < MIN_RUNS:
        return None
    place = min(count, math.ceil(LEVEL_PERCENT * (count + 1) / 100))
    reach = sizes[place - 1]
    return Interval(min(LEVEL_PERCENT, 100 * place // (count + 1)), -reach, reach, count)


def with_interval(estimate: MemoryEstimate, interval: Interval | None) -> MemoryEstimate:
    """`estimate` between the bounds of `interval`; as it is without one."""
    if interval is None:
        return estimate
    low, high = interval.bounds(estimate.peak_bytes)
    return replace(estimate, low_bytes=low, high_bytes=high)
