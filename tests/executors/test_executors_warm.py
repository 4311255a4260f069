"""The process behind the dial: the same model for every question, and another one after it ended."""

import json
import sys

import psutil
import pytest

from lora_engine.assets_path import asset_path
from lora_engine.config import DataConfig, FullConfig, LoraConfig, RunConfig, TrainConfig, to_dict
from lora_engine.dialer import read_losses
from lora_engine.errors import InputError, RunFailedError
from lora_engine.executors.warm import WarmProcess
from lora_engine.jobs import execute_run, generate_from_run
from lora_engine.runs import Ledger, this_process

ECHO = """
import json, os, sys
for line in sys.stdin:
    question = json.loads(line)
    if question.get("die"): os._exit(3)
    if question.get("hang"): import time; time.sleep(60)
    print(json.dumps({"pid": os.getpid(), "home": sys.argv[-1]} | question), flush=True)
"""


@pytest.fixture
def echo(tmp_path):
    warm = WarmProcess(tmp_path, [sys.executable, "-c", ECHO], timeout_seconds=1.0)
    yield warm
    warm.close()


def test_one_process_answers_until_it_ends_and_then_another(echo, tmp_path):
    first = echo.ask({"n": 1})
    assert first["home"] == str(tmp_path)
    assert echo.ask({"n": 2})["pid"] == first["pid"]
    psutil.Process(first["pid"]).kill()
    again = echo.ask({"n": 3})
    assert (again["n"], again["pid"] != first["pid"]) == (3, True)
    with pytest.raises(InputError, match="run is 'x'"):
        echo.ask({"error": "run is 'x'; allowed: another."})
    echo.close()
    assert not psutil.pid_exists(again["pid"])


@pytest.mark.parametrize("how", ["die", "hang"])
def test_no_answer_is_one_sentence_and_the_next_question_works(echo, how):
    with pytest.raises(RunFailedError, match="ended without an answer"):
        echo.ask({how: True})
    assert echo.ask({"n": 1})["n"] == 1


def test_the_dial_from_the_base_to_twice_the_update(home):
    ledger = Ledger(home)
    train = TrainConfig(steps=3, batch_size=4, max_length=64, device="cpu", eval_examples=4, lr=1e-2)
    data = DataConfig(path=str(asset_path("datasets/customer_support.jsonl")))
    config = RunConfig(data=data, method=LoraConfig(r=4), train=train)
    run_id = ledger.create_run(to_dict(config), num_steps=3)
    assert ledger.claim_run(run_id, *this_process())
    state, result = execute_run(config, ledger.run_folder(run_id))
    ledger.finish_run(run_id, "done", result=result)
    full = ledger.create_run(to_dict(RunConfig(data=data, method=FullConfig())), num_steps=3)

    warm = WarmProcess(home)
    try:
        asked = {"run_id": run_id, "prompt": "My parcel has not come.", "max_new_tokens": 12, "seed": 3}
        for scale, temperature in [(0.0, 0.0), (1.0, 0.0), (1.7, 0.9)]:
            text = warm.ask(asked | {"scale": scale, "temperature": temperature})["text"]
            alone = generate_from_run(
                to_dict(config), ledger.run_folder(run_id), prompt=asked["prompt"], scale=scale,
                max_new_tokens=12, temperature=temperature, seed=3,
            )  # fmt: skip
            assert text == alone["text"]
        losses = {scale: warm.ask({"run_id": run_id, "scale": scale, "eval": True})["eval_loss"] for scale in (0, 1)}
        assert losses == {
            0: pytest.approx(state.eval_loss_before, abs=1e-6),
            1: pytest.approx(state.eval_loss_after, abs=1e-6),
        }
        assert read_losses(ledger, run_id) == losses
        assert json.loads((ledger.run_folder(run_id) / "dial.json").read_text()).keys() == {"0", "1"}
        for question, words in [
            (asked | {"scale": 2.5}, "scale is 2.5; allowed: a number from 0 to 2"),
            (asked | {"run_id": full}, "allowed: a LoRA run that is done"),
            (asked | {"run_id": "nothing"}, "run is 'nothing'"),
        ]:
            with pytest.raises(InputError, match=words):
                warm.ask(question)
    finally:
        warm.close()
