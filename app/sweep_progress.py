"""How far a whole grid is, counted in steps over all its runs: with shared passes many runs go on at once."""

import time
from dataclasses import dataclass

import pandas as pd
import streamlit as st
from charts.heatmap import OVER, is_dropped, steps_done
from formatting import format_duration, plural

WINDOW_SECONDS = 60.0  # the pace is that of so many last seconds: several evaluations fall into them
LEAST_SECONDS = 1.5  # and is not told from less

Samples = list[tuple[float, float]]
"""(seconds on a clock, steps done) as seen at each refresh."""


@dataclass(frozen=True)
class Progress:
    """Counts over all runs of a sweep. `steps` is what is still meant to be done and what is done: a run that was
    stopped counts with the steps it had."""

    runs: int
    over: int
    dropped: int
    begun: int
    steps_done: int
    steps: int

    @property
    def share(self) -> float:
        return min(1.0, self.steps_done / self.steps) if self.steps else 0.0


def count_progress(frame: pd.DataFrame) -> Progress:
    """From the table of a sweep's runs."""
    done = steps_done(frame)
    over = frame["status"].isin(OVER)
    return Progress(
        runs=len(frame),
        over=int(over.sum()),
        dropped=int(is_dropped(frame).sum()),
        begun=int(((frame["status"] == "running") & (done > 0)).sum()),
        steps_done=int(done.sum()),
        steps=int(done.where(over, frame["steps"]).sum()),
    )


def note_pace(sweep_id: str, done: int, now: float | None = None) -> float | None:
    """Remember how many steps are done now; steps a second over the last seconds, None before there is a pace."""
    samples: Samples = st.session_state.get(f"_pace_{sweep_id}", [])
    samples = add_sample(samples, time.monotonic() if now is None else now, done)
    st.session_state[f"_pace_{sweep_id}"] = samples
    return pace(samples)


def add_sample(samples: Samples, now: float, done: float) -> Samples:
    """The samples of the last WINDOW_SECONDS, and this one.

    Fewer steps than before: a run began again, so its past does not count; nor does the time before the first step
    that was seen, in which a model was loaded."""
    kept = [*((t, n) for t, n in samples if now - t <= WINDOW_SECONDS and n <= done), (now, done)]
    idle = sum(n == kept[0][1] for _, n in kept)
    return kept[max(0, idle - 1) :] if idle < len(kept) else kept


def pace(samples: Samples) -> float | None:
    """Steps a second from the oldest sample to the last that saw a step; None where that is too short.

    The steps of a pack come together: without them the pace would fall from one to the next. Where nothing came for
    longer than that, it does fall."""
    if len(samples) < 2:
        return None
    (began, before), (now, done) = samples[0], samples[-1]
    seen = next(t for t, n in samples if n == done)
    until = now if now - seen > seen - began else seen
    if until - began < LEAST_SECONDS or done <= before:
        return None
    return (done - before) / (until - began)


def seconds_left(progress: Progress, steps_a_second: float | None) -> float | None:
    """At this pace, if nothing more is dropped; None, too, when only files are still to be written."""
    steps = progress.steps - progress.steps_done
    return steps / steps_a_second if steps_a_second and steps else None


def progress_words(progress: Progress, doing: str, left: float | None) -> str:
    """One line: steps over all runs, runs over, what is being done, seconds left."""
    parts = [
        f"{progress.steps_done:,} of {plural(progress.steps, 'step')} over all runs",
        f"{progress.over} of {plural(progress.runs, 'run')} over"
        + (f" ({progress.dropped} stopped early)" if progress.dropped else ""),
    ]
    if progress.begun > 1:
        parts.append(f"{progress.begun} begun")
    parts.append(doing)
    if left is not None:
        # No seconds where they would only flicker.
        parts.append(f"{format_duration(left if left < 300 else 60 * round(left / 60))} left")
    return "; ".join(part for part in parts if part)
