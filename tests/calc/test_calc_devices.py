"""Which precision a run gets where nobody chose one, with the driver's library played."""

import argparse
import ctypes

import pytest

from lora_engine.calc import devices
from lora_engine.commands.requests import precision_of


class Driver:
    """NVML as far as it is asked, with one card."""

    def __init__(self, major, minor):
        self.capability, self.open = (major, minor), 0

    def nvmlInit_v2(self):
        self.open += 1
        return 0

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, card):
        card._obj.value = 7 + index
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, card, major, minor):
        assert card.value == 7
        major._obj.value, minor._obj.value = self.capability
        return 0


def forget():
    """What was asked of the machine before."""
    devices.has_cuda.cache_clear()
    devices._compute_capability.cache_clear()


@pytest.fixture
def driver(monkeypatch):
    """A machine with a card of this compute capability and a torch for it."""

    def install(major, minor):
        made = Driver(major, minor)
        monkeypatch.setattr(ctypes, "CDLL", lambda _name: made)
        monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        forget()
        return made

    yield install
    forget()


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_bfloat16_where_the_card_computes_in_it(driver, capability, precision):
    made = driver(*capability)
    assert devices.default_precision("auto") == devices.default_precision("cuda") == precision
    assert devices.default_precision("cpu") == devices.default_precision("mps") == "fp32"
    assert made.open == 0


def test_float32_without_a_card(monkeypatch):
    def missing(_name):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    forget()
    assert {devices.default_precision(device) for device in ("auto", "cuda", "cpu")} == {"fp32"}
    forget()


def test_what_was_asked_for_counts_and_full_fine_tuning_keeps_float32(driver):
    driver(8, 6)
    assert precision_of(argparse.Namespace(precision="nf4", device="cuda")) == "nf4"
    assert precision_of(argparse.Namespace(precision=None, device="auto", method="lora")) == "bf16"
    assert precision_of(argparse.Namespace(precision=None, device="auto")) == "bf16"  # a sweep is of LoRA
    assert precision_of(argparse.Namespace(precision=None, device="auto", method="full")) == "fp32"
    assert precision_of(argparse.Namespace(precision=None, device="auto", methods="lora,full")) == "fp32"
