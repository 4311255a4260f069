"""Charts: prepare a table, then draw it. DataFrames in, Figures out; no Streamlit, no engine."""

from charts.accuracy import error_table, plot_errors, plot_predicted_measured
from charts.common import METHOD_COLOURS, TERM_COLOURS, TERM_WORDS
from charts.curves import overlay_table, plot_curves, plot_overlay
from charts.explore import parameter_table, plot_memory, plot_parameters
from charts.heatmap import heatmap_table, plot_heatmap
from charts.iso import iso_table
from charts.sweep import (
    cost_by_rank_table,
    pareto_table,
    plot_loss_by_rank,
    plot_memory_by_rank,
    plot_pareto,
    plot_time_by_rank,
)

__all__ = [
    "METHOD_COLOURS",
    "TERM_COLOURS",
    "TERM_WORDS",
    "cost_by_rank_table",
    "error_table",
    "heatmap_table",
    "iso_table",
    "overlay_table",
    "parameter_table",
    "pareto_table",
    "plot_curves",
    "plot_errors",
    "plot_heatmap",
    "plot_loss_by_rank",
    "plot_memory",
    "plot_memory_by_rank",
    "plot_overlay",
    "plot_parameters",
    "plot_pareto",
    "plot_predicted_measured",
    "plot_time_by_rank",
]
