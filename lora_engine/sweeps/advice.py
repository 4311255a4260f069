"""Which rank is enough? Tables over the grid, and one sentence with its reason."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lora_engine.errors import ConfigError, InputError

AXES = ("r", "lora_alpha", "lr")
# With one seed nobody knows the noise. LoRA's variants land within 1-2 % once the rate is tuned.
FALLBACK_NOISE_SHARE = 0.01
_EXTRAS = ("trainable_parameters", "seconds", "peak_bytes", "adapter_bytes")
_MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The smallest rank that is enough, with the best alpha and learning rate at that rank.

    `noise` is the pooled standard deviation over seeds, in nats; where no cell has two seeds
    (`noise_known` False) it is FALLBACK_NOISE_SHARE of the best loss. `table` is `best_over(frame, "r")`."""

    r: int
    lora_alpha: float
    lr: float
    reason: str
    noise: float
    noise_known: bool
    table: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not a finite number becomes None."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lr": self.lr,
            "reason": self.reason,
            "noise": self.noise,
            "noise_known": self.noise_known,
            "table": [
                {str(key): _json_value(value) for key, value in row.items()} for row in self.table.to_dict("records")
            ],
        }


def summarize_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell (r, lora_alpha, lr) of the done runs in `frame`, ordered by the three.

    `eval_loss` is the mean over the seeds whose loss is a number, `eval_loss_std` its sample
    standard deviation (NaN with one), `eval_loss_min`, `eval_loss_max`; `num_seeds` counts those,
    `num_diverged` the others. Means of trainable_parameters, seconds, peak_bytes and adapter_bytes
    are added where the frame has them."""
    for column in (*AXES, "eval_loss_after"):
        if column not in frame.columns:
            raise ConfigError("frame", list(frame.columns), f"a table of runs with the column {column}")
    rows = _done_runs(frame)
    losses = rows["eval_loss_after"].astype("float64")
    rows = rows.assign(_loss=losses.where(losses.map(math.isfinite)))
    grouped = rows.groupby(list(AXES), sort=True)
    cells = grouped["_loss"].agg(["mean", "std", "min", "max", "count"])
    cells.columns = ["eval_loss", "eval_loss_std", "eval_loss_min", "eval_loss_max", "num_seeds"]
    cells["num_diverged"] = grouped.size() - cells["num_seeds"]
    for extra in _EXTRAS:
        if extra in rows.columns:
            cells[extra] = grouped[extra].mean()
    cells = cells.reset_index()
    return cells.astype({"r": "int64", "lora_alpha": "float64", "lr": "float64", "num_seeds": "int64"})


def best_over(frame: pd.DataFrame, by: str | Sequence[str]) -> pd.DataFrame:
    """For each value of `by` ("r", or ("r", "lora_alpha"), ...) its best cell over the other axes.

    Columns as in `summarize_cells`. Best is the lowest mean loss; a cell with a diverged run counts
    only where no other cell of that value is left, and one without any finite loss is left out.
    Equal losses: the smaller alpha, then the smaller learning rate."""
    keys = [by] if isinstance(by, str) else list(by)
    for key in keys:
        if key not in AXES:
            raise ConfigError("by", key, f"one of {', '.join(AXES)}")
    cells = summarize_cells(frame)
    cells = cells[cells["num_seeds"] > 0]
    cells = cells.assign(_unsafe=cells["num_diverged"] > 0).sort_values(["_unsafe", "eval_loss", *AXES])
    best = cells.groupby(keys, sort=True).head(1).sort_values(keys)
    return best.drop(columns="_unsafe").reset_index(drop=True)


def advise(frame: pd.DataFrame) -> Advice:
    """The smallest rank whose loss (mean over seeds, best over alpha and rate) is within noise of the best.

    `frame` has rows of `runs_frame`; those that are not done, or not LoRA, are left out. Raises
    InputError when no run is done, when all diverged, or when models or datasets are mixed."""
    table = best_over(frame, "r")
    if table.empty:
        raise InputError(_nothing_to_say(frame))
    _check_comparable(_done_runs(frame))
    clean = table[table["num_diverged"] == 0] if (table["num_diverged"] == 0).any() else table
    best = _lowest(clean)
    known, noise = _pooled_std(clean, summarize_cells(frame))
    if not known:
        noise = FALLBACK_NOISE_SHARE * abs(float(best["eval_loss"]))
    # A hair of tolerance, so that equal means in another order of summation stay equal.
    limit = float(best["eval_loss"]) + noise + 1e-12 * abs(float(best["eval_loss"]))
    chosen = clean[clean["eval_loss"] <= limit].iloc[0]
    reason = " ".join(
        part
        for part in (
            _verdict(chosen, best, clean, noise, known),
            _missing_sentence(frame),
            _diverged_sentence(frame),
        )
        if part
    )
    return Advice(
        r=int(chosen["r"]),
        lora_alpha=float(chosen["lora_alpha"]),
        lr=float(chosen["lr"]),
        reason=reason,
        noise=noise,
        noise_known=known,
        table=table,
    )


def _lowest(table: pd.DataFrame) -> "pd.Series[Any]":
    """The row of the lowest loss; of equal ones the first, which has the smallest rank."""
    return table.sort_values("eval_loss", kind="stable").iloc[0]


def _done_runs(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame
    if "status" in rows.columns:
        rows = rows[rows["status"] == "done"]
    if "method" in rows.columns:
        rows = rows[rows["method"] == "lora"]
    return rows[rows["r"].notna()]


def _check_comparable(rows: pd.DataFrame) -> None:
    for column in ("model", "data_path" if "data_path" in rows.columns else "data"):
        if column in rows.columns and rows[column].nunique() > 1:
            named = ", ".join(sorted(str(value) for value in rows[column].unique())[:_MAX_NAMED])
            raise ConfigError(
                "frame", f"runs of {named}", "runs of one model on one dataset: other losses do not compare"
            )


def _pooled_std(best: pd.DataFrame, cells: pd.DataFrame) -> tuple[bool, float]:
    """(known, standard deviation over seeds pooled by degrees of freedom).

    Over the cells that compete, one a rank: a cell at the edge of divergence would drown the rest.
    Over all clean cells where those have one seed each."""
    for group in (best, cells[cells["num_diverged"] == 0]):
        repeated = group[group["num_seeds"] > 1]
        if not repeated.empty:
            freedom = repeated["num_seeds"] - 1
            return True, math.sqrt(float((freedom * repeated["eval_loss_std"] ** 2).sum() / freedom.sum()))
    return False, math.nan


def _verdict(chosen: "pd.Series[Any]", best: "pd.Series[Any]", table: pd.DataFrame, noise: float, known: bool) -> str:
    others = table[table["r"] != chosen["r"]]
    own, top = float(chosen["eval_loss"]), float(best["eval_loss"])
    r = int(chosen["r"])
    if others.empty:
        text = _numbers([own], noise)
        return (
            f"Only rank {r} gave a loss: {text[0]}, and {_noise_words(text[-1], known)}. Other ranks would tell more."
        )
    if int(best["r"]) != r:
        text = _numbers([own, top], noise)
        head = f"Rank {r} is enough: {text[0]} against {text[1]} at rank {int(best['r'])}"
    elif r == int(table["r"].min()):
        rival = _lowest(others)
        text = _numbers([own, float(rival["eval_loss"])], noise)
        head = f"Rank {r} is enough: {text[0]}, no higher rank does better ({text[1]} at rank {int(rival['r'])})"
    else:
        rival = others[others["r"] < r].sort_values("r").iloc[-1]
        text = _numbers([own, float(rival["eval_loss"])], noise)
        head = f"Rank {r} is needed: {text[0]} against {text[1]} at rank {int(rival['r'])}"
    tail = ""
    if r == int(table["r"].max()):
        tail = " It is the highest rank tried, so a higher one may do better still."
    return f"{head}, and {_noise_words(text[-1], known)}.{tail}"


def _noise_words(noise: str, known: bool) -> str:
    if known:
        return f"seeds differ by {noise}"
    return f"with one seed the noise is unknown, so {FALLBACK_NOISE_SHARE:.0%} of the loss ({noise}) stands in for it"


def _numbers(losses: Sequence[float], noise: float) -> list[str]:
    """The losses and the noise with two decimals, or as many up to five as tell them apart."""
    for decimals in range(2, 6):
        text = [f"{value:.{decimals}f}" for value in (*losses, noise)]
        told_apart = len(set(text[:-1])) == len(set(losses))
        if told_apart and (noise == 0 or float(text[-1]) > 0):
            break
    return text


def _missing_sentence(frame: pd.DataFrame) -> str:
    """How many cells the grid spanned by the done runs lacks, and how many of all early exit dropped."""
    rows = _done_runs(frame)
    axes = [*AXES, *(["seed"] if "seed" in rows.columns else [])]
    planned = math.prod(rows[axis].nunique() for axis in axes)
    dropped = _dropped_runs(frame)
    spanned = dropped.iloc[[all(row[a] in set(rows[a]) for a in axes) for row in dropped.to_dict("records")]]
    missing = planned - len(rows.drop_duplicates(subset=axes)) - len(spanned)
    sentences = []
    if missing > 0:
        sentences.append(f"{missing} of {planned} runs of the grid {'is' if missing == 1 else 'are'} missing.")
    if len(dropped):
        sentences.append(f"Early exit dropped {len(dropped)} runs that were behind.")
    return " ".join(sentences)


def _dropped_runs(frame: pd.DataFrame) -> pd.DataFrame:
    if "early_exit_step" not in frame.columns or "status" not in frame.columns:
        return frame.iloc[:0]
    return frame[frame["early_exit_step"].notna() & (frame["status"] == "cancelled")]


def _diverged_sentence(frame: pd.DataFrame) -> str:
    rows = _done_runs(frame)
    diverged = rows[~rows["eval_loss_after"].astype("float64").map(math.isfinite)]
    if diverged.empty:
        return ""
    names = [_name_run(row) for row in diverged.head(_MAX_NAMED).to_dict("records")]
    if len(diverged) > _MAX_NAMED:
        names.append(f"{len(diverged) - _MAX_NAMED} more")
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"Diverged and left out: {listed}."


def _name_run(row: dict[Hashable, Any]) -> str:
    name = f"rank {int(row['r'])} at alpha {row['lora_alpha']:g}, learning rate {row['lr']:g}"
    return f"{name}, seed {row['seed']:g}" if "seed" in row else name


def _nothing_to_say(frame: pd.DataFrame) -> str:
    rows = _done_runs(frame)
    if rows.empty:
        return "frame has no finished LoRA run; allowed: at least one run that is done."
    return f"eval_loss_after is not a number in all {len(rows)} runs, so they diverged: try a lower learning rate."


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str) else int(value)
