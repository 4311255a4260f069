"""Accuracy: can I trust these figures?"""

import cache
import charts
import state
import streamlit as st
from accuracy import COLUMNS, error_sentence, interval_sentence, kind_sentences
from charts.accuracy import signed_percent
from formatting import MIB, plural
from widgets import download_table, empty_state, explain, show_chart

st.header("Can I trust these figures?", anchor=False)

frame = cache.accuracy()
if frame.empty:
    if empty_state(
        "Every run keeps the memory that was predicted before it started beside what was measured. Here you will see "
        "one against the other, and how far predictions are off on this machine.",
        "Fine-tune for the first time",
        key="first_run",
    ):
        state.open_page("views/finetune.py")
    st.stop()

interval = cache.interval()
st.markdown(f"**{error_sentence(frame)}**")
for sentence in kind_sentences(frame):
    st.markdown(sentence)
st.caption(interval_sentence(interval, len(frame)))

left, right = st.columns(2, gap="large")
with left:
    st.subheader("Predicted and measured", anchor=False)
    show_chart(
        charts.plot_predicted_measured(frame),
        frame,
        name="predicted_measured",
        alt=f"Measured peak memory of {plural(len(frame), 'run')} against what was predicted, with the diagonal.",
    )
    if frame["kind"].nunique() > 1:
        st.caption("Filled: allocated on the card. Open: tensor bytes on the CPU.")
with right:
    st.subheader("Errors", anchor=False)
    errors = charts.error_table(list(frame["error_percent"]))
    show_chart(
        charts.plot_errors(
            errors,
            band=(interval.low_percent, interval.high_percent) if interval else None,
            band_text=f"shaded: the interval shown with predictions ({interval.level_percent} %)" if interval else "",
        ),
        errors,
        name="errors",
        alt=f"Distribution of {plural(len(frame), 'error')}: measured minus predicted in percent of the predicted, "
        f"from {signed_percent(frame['error_percent'].min())} to {signed_percent(frame['error_percent'].max())}.",
    )

st.subheader("Every run", anchor=False)
newest_first = frame.iloc[::-1].reset_index(drop=True)
st.dataframe(
    newest_first.assign(
        predicted_mib=newest_first["predicted_bytes"] / MIB,
        measured_mib=newest_first["measured_bytes"] / MIB,
        reserved_mib=newest_first["reserved_bytes"] / MIB,
    )[list(COLUMNS)],
    hide_index=True,
    column_config=COLUMNS,
)
download_table(frame, "accuracy", "Export CSV")


def _formula() -> None:
    st.latex(r"e = \frac{\text{measured} - \text{predicted}}{\text{predicted}}")
    st.latex(r"P\left(|e_{n+1}| \le |e|_{(k)}\right) \ge \frac{k}{n+1}")
    st.caption(
        "The k-th smallest of n absolute errors covers the next one with at least k / (n + 1), whatever their "
        "distribution (split conformal prediction, Lei et al. 2018, section 2). It asks that runs be alike."
    )


explain(
    "Predictions are written down before a run starts and never changed. On a card the measurement is what tensors "
    "held at the peak (allocated); on a CPU the bytes of all live tensors, counted operation by operation.",
    _formula,
)
