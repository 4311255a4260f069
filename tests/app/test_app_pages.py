"""Each page as Streamlit runs it, without a browser."""

import json
import os
import subprocess
import sys

import pytest
from app_pages import MAIN, PAGES, PARCELS, ROOT, finished_run, open_page, parcels, texts
from bad_uploads import BAD_UPLOADS

from lora_engine.runs import Ledger, store_upload


@pytest.fixture
def upload(home):
    """The name of a good file kept at home."""
    return parcels(home)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_on_an_empty_home(page):
    app = open_page(page)
    assert app.header[0].value.endswith("?")
    assert not app.error


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_with_a_run_and_a_sweep_to_show(page, home, upload):
    run_id = finished_run(home)
    open_page(page, run=run_id, data=upload)


def test_deep_link_sets_the_sidebar():
    app = open_page(r="32", lora_alpha="24", model="meta-llama/Llama-3.1-8B", precision="nf4", targets="attention")
    settings = app.session_state["_settings"]
    assert (settings.r, settings.lora_alpha, settings.precision) == (32, 24.0, "nf4")
    assert (settings.model, settings.targets) == ("meta-llama/Llama-3.1-8B", "attention")
    assert "alpha / r = 0.75" in texts(app)


def test_kept_ratio_moves_alpha_with_the_rank():
    app = open_page()
    app.toggle(key="keep_ratio").set_value(True).run()
    app.select_slider(key="r").set_value(32).run()
    assert app.session_state["lora_alpha"] == 64.0
    assert "alpha / r = 2.0" in texts(app)


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"model": "no/such-model"}, "embedded model"),
        ({"targets": "own", "own_targets": "nothing_like_this"}, "all-linear"),
    ],
)
def test_a_wrong_setting_is_said_in_place_and_the_page_goes_on(parameters, part):
    app = open_page(**parameters)
    assert len(app.error) == 1
    assert part in app.error[0].value
    assert len(app.subheader) >= 3


def test_the_first_example_is_one_click_away():
    from lora_engine.data import EXAMPLES
    from lora_engine.errors import NotFoundError

    try:
        EXAMPLES[0].path  # noqa: B018
    except NotFoundError:
        pytest.skip("the examples are not there")
    app = open_page("views/finetune.py")
    app.button(key="first_example").click().run()
    assert not app.error
    assert "Customer support" in texts(app)
    assert app.button(key="start").label == "Start"


def test_data_report_and_prediction(upload):
    app = open_page("views/finetune.py", data=upload)
    text = texts(app)
    assert "30 of 30 rows kept" in text
    assert "prompt and completion" in text
    assert "162,816 parameters" in text
    assert "Predicted: about" in text


def test_labels_are_reported_as_the_classes_of_a_classifier(home):
    rows = "".join(f"the film {i} was {word},{word}\n" for i in range(20) for word in ("good", "bad"))
    path = store_upload(home, "reviews.csv", f"text,label\n{rows}".encode())
    text = texts(open_page("views/finetune.py", data=f"{path.parent.name}/{path.name}")).replace("\\", "")
    assert "read as text and label: 40 of 40 rows kept" in text
    assert "tokens; 2 classes: bad 20, good 20." in text
    assert "are trained on" not in text
    assert "the highlighted part is the class that it learns to choose" in text
    assert "163,200 parameters" in text  # LoRA's 162,816 and the head's 2 x 192


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("broken.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": ', "line 2"),
        ("empty.csv", b"", "empty"),
        ("nul.txt", b"one\x00two\n", "NUL"),
        ("columns.csv", b"foo,bar\n1,2\n3,4\n", "'foo', 'bar'"),
        ("twice.csv", b"prompt,prompt\n1,2\n3,4\n", "twice"),
    ],
)
def test_bad_data_is_one_sentence_and_nothing_else_breaks(home, name, content, words):
    path = store_upload(home, name, content)
    app = open_page("views/finetune.py", data=f"{path.parent.name}/{path.name}")
    assert len(app.error) == 1
    assert words in app.error[0].value
    assert not [button for button in app.button if button.key == "start"]
    assert app.expander


@pytest.mark.parametrize("kind", [kind for kind in BAD_UPLOADS if kind != "30 MB"])  # that one is never stored
def test_every_kind_of_bad_upload_gets_its_sentence_on_both_pages(home, kind):
    name, content, words = BAD_UPLOADS[kind]
    path = store_upload(home, name, content())
    for page in ("views/finetune.py", "views/sweep.py"):
        app = open_page(page, data=f"{path.parent.name}/{path.name}")
        assert any(words in str(error.value) for error in app.error), [error.value for error in app.error]
        assert not [button for button in app.button if button.key in ("start", "start_sweep")]
        assert app.sidebar.selectbox  # the rest of the page stands


def test_columns_can_be_named_by_hand(home):
    rows = "\n".join(f"Where is parcel {i},It left on day {i}" for i in range(30))
    path = store_upload(home, "odd.csv", f"foo,bar\n{rows}\n".encode())
    app = open_page("views/finetune.py", data=f"{path.parent.name}/{path.name}")
    app.selectbox(key="read_task").set_value("prompt_completion").run()
    app.text_input(key="read_column_prompt").input("foo").run()
    app.text_input(key="read_column_completion").input("bar").run()
    assert not app.error
    assert "30 of 30 rows kept" in texts(app)


@pytest.mark.parametrize("name", ["../../etc/passwd", "gone/file.csv"])
def test_a_data_link_cannot_leave_the_home(name):
    app = open_page("views/finetune.py", data=name)
    assert "not on this machine" in app.error[0].value


def test_start_writes_a_run_with_its_prediction_and_hands_it_over(home, upload, monkeypatch):
    from lora_engine.executors import LocalExecutor

    submitted = []
    monkeypatch.setattr(LocalExecutor, "submit", lambda _self, run_ids: submitted.extend(run_ids))
    app = open_page("views/finetune.py", data=upload, r="4")
    app.button(key="start").click().run()
    assert not app.exception
    record = Ledger(home).get_run(submitted[0])
    assert record.config["method"]["r"] == 4
    assert record.config["data"]["path"].endswith("parcels.jsonl")
    assert record.prediction["trainable_parameters"] == 81_408
    assert app.query_params["run"] in (submitted[0], submitted)


def test_a_finished_run_answers_in_one_sentence(home):
    app = open_page("views/finetune.py", run=finished_run(home))
    text = texts(app)
    assert "Evaluation loss fell from 6.00 to 3.90 in 49 s; 5.17 % of the parameters trained." in text
    assert "before and after" in text


def test_an_interrupted_run_can_be_resumed(home, monkeypatch):
    from lora_engine.executors import LocalExecutor

    submitted = []
    monkeypatch.setattr(LocalExecutor, "submit", lambda _self, run_ids: submitted.extend(run_ids))
    run_id = finished_run(home, status="cancelled")
    app = open_page("views/finetune.py", run=run_id)
    app.button(key=f"resume_{run_id}").click().run()
    assert submitted == [run_id]
    assert Ledger(home).get_run(run_id).status == "queued"


def test_a_run_that_is_not_there_is_forgotten():
    app = open_page("views/finetune.py", run="20260101-000000-abcd")
    assert app.error
    app.run()
    assert not app.error


def test_runs_page_filters_by_words_and_status(home):
    finished_run(home, r=2)
    finished_run(home, r=4, status="cancelled")
    app = open_page("views/runs.py")
    assert len(app.dataframe[0].value) == 2
    app.button_group(key="runs_status").set_value(["done"]).run()
    assert list(app.dataframe[0].value["r"]) == [2]
    app.text_input(key="runs_search").input("nothing like this").run()
    assert len(app.dataframe[0].value) == 0


def test_the_server_never_imports_torch(home):
    code = f"""
import sys
sys.path.insert(0, {str(MAIN.parent)!r})
from streamlit.testing.v1 import AppTest
app = AppTest.from_file({str(MAIN)!r}, default_timeout=60).run()
for page in {PAGES!r}:
    app.switch_page(page).run()
    assert not app.exception, app.exception
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    environment = os.environ | {"LORA_EXPLORER_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_an_upload_is_kept_at_home_and_named_in_the_address(home):
    app = open_page("views/finetune.py")
    content = "\n".join(json.dumps(row) for row in PARCELS).encode()
    app.file_uploader(key="upload").upload("parcels.jsonl", content, "application/jsonl").run()
    assert not app.error
    assert "30 of 30 rows kept" in texts(app)
    name = app.session_state["_data"]
    assert (home / "datasets" / name).read_bytes() == content


def test_a_file_that_is_too_large_gets_a_sentence_and_an_example_still_works():
    from lora_engine.data import MAX_UPLOAD_BYTES

    app = open_page("views/finetune.py")
    app.file_uploader(key="upload").upload("big.csv", b"x" * (MAX_UPLOAD_BYTES + 1), "text/csv").run()
    assert "at most 20 MB are read" in app.error[0].value
    app.button_group(key="example").set_value("short_stories").run()
    assert not app.error
    assert "Short stories" in texts(app)
