"""Which backend quantizes a tensor, and how a user chooses it."""

import logging

import pytest
import torch
from stochastic_fp8_pack.kernels import UnknownChoiceError, list_backends, quantize_tensor
from stochastic_fp8_pack.kernels.numerics.backends import BACKEND_VARIABLE, BACKENDS, choose_backend, nvidia

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_choices(monkeypatch):
    """The variable is read once per device."""
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def test_the_cpu_backend_is_the_default_on_a_cpu():
    assert choose_backend(CPU).name == "cpu"


def test_other_devices_get_the_reference():
    assert choose_backend(torch.device("mps")).name == "reference"


@pytest.mark.parametrize(("name", "chosen"), [("cpu", "cpu"), ("reference", "reference"), ("", "cpu")])
def test_the_environment_variable_chooses_the_backend(monkeypatch, name, chosen):
    monkeypatch.setenv("STOCHASTIC_FP8_BACKEND", name)
    assert choose_backend(CPU).name == chosen


def test_a_chosen_backend_that_cannot_run_falls_back_to_the_reference_with_one_warning(monkeypatch, caplog):
    monkeypatch.setenv(BACKEND_VARIABLE, "nvidia")
    with caplog.at_level(logging.WARNING, "stochastic_fp8"):
        assert [choose_backend(CPU).name for _ in range(3)] == ["reference"] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nvidia cannot run on cpu (it runs on NVIDIA GPUs only)" in caplog.text


def test_an_unknown_backend_is_an_error_that_lists_the_choices(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    text = "unknown STOCHASTIC_FP8_BACKEND 'triton': choose one of cpu, nvidia, reference"
    with pytest.raises(UnknownChoiceError, match=text):
        quantize_tensor(torch.ones(1))


@pytest.mark.parametrize("name", BACKENDS)
def test_the_chosen_backend_does_not_change_the_bytes(monkeypatch, name):
    x = torch.randn(300_000)
    expected = quantize_tensor(x, key="w", statistics=True)
    choose_backend.cache_clear()
    monkeypatch.setenv(BACKEND_VARIABLE, name)
    q = quantize_tensor(x, key="w", statistics=True)
    assert torch.equal(q.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert q.error.step_histogram == expected.error.step_histogram


def test_the_list_shows_each_backend_on_each_device(monkeypatch):
    for module, count in ((torch.cuda, 2), (torch.xpu, 0), (torch.mps, 0)):
        monkeypatch.setattr(module, "device_count", lambda count=count: count)
    monkeypatch.setattr(nvidia, "_why_triton_fails", lambda device: "no C compiler" if device.index else None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert list_backends() == {
        "cpu": {"cpu": None, "cuda:0": "it runs on the CPU only", "cuda:1": "it runs on the CPU only"},
        "nvidia": {"cpu": "it runs on NVIDIA GPUs only", "cuda:0": None, "cuda:1": "no C compiler"},
        "reference": {"cpu": None, "cuda:0": None, "cuda:1": None},
    }


def test_nvidia_is_unavailable_without_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert nvidia._why_triton_fails.__wrapped__(torch.device("cuda")) == "Triton is not installed"


def test_nvidia_is_unavailable_on_an_amd_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert nvidia.unavailable(torch.device("cuda")) == "it runs on NVIDIA GPUs only"


def test_nvidia_is_unavailable_where_triton_fails_and_gives_the_reason(monkeypatch):
    def fail(flat):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(nvidia, "tensor_to_amax", fail)
    assert "Failed to find C compiler" in nvidia._why_triton_fails.__wrapped__(CPU)
