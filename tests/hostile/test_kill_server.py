"""A real ComfyUI ended at random moments of a job: what it wrote before stays whole, and the next job cleans up."""

import contextlib
import os
import random
import shutil
import signal
import time

import psutil
import pytest
import tiny_models
from comfyui.graph import Graph
from comfyui.pack import FILE_OPTIONS, RECIPE, quantize, save
from comfyui.server import ComfyUIServer
from hostile.amounts import amount
from hostile.processes import files_of, wait_for_new_file
from stochastic_fp8_pack.kernels import inspect_file

WRITING_SECONDS = 0.2
"""About as long as a job writes."""
EXIT_SECONDS = 20
"""ComfyUI ends itself on SIGINT. If it takes longer than this, it is ended with SIGTERM."""


def file_job(file, prefix, **options):
    graph = Graph()
    choices = {**RECIPE, **FILE_OPTIONS, **options}
    graph.add("StochasticFP8QuantizeFile", file=f"diffusion_models/{file}", filename_prefix=prefix, **choices)
    return graph


def save_job(file, prefix):
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=file, weight_dtype="default")
    save(graph, prefix, model=quantize(graph, model))
    return graph


JOBS = {
    "Save": lambda: save_job("large.safetensors", "saved"),
    "Convert File to FP8": lambda: file_job("large.safetensors", "quantized", overwrite=True),
}
KILLS = [("Save", "SIGKILL", 1)]
KILLS = amount(KILLS, [(job, name, 2) for job in JOBS for name in ("SIGKILL", "SIGTERM", "SIGINT")])
"""(job, signal, times) of each test."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that takes a moment to write, and a small one."""
    folder = tmp_path_factory.mktemp("models")
    return [
        tiny_models.write_sd3(folder / "large.safetensors", depth=8),
        tiny_models.write_sd3(folder / "small.safetensors"),
    ]


@pytest.fixture
def server(models, tmp_path):
    """A ComfyUI of its own, not started yet."""
    server = ComfyUIServer(tmp_path)
    for path in models:
        shutil.copy(path, server.models("diffusion_models"))
    yield server
    server.stop()


def kill(server, job, name, rng):
    """Start a job in the running server and end the server while it writes. Whether a temporary file was left."""
    known = files_of(server.output)
    server.post("/prompt", {"prompt": JOBS[job]().prompt, "client_id": "hostile"})
    assert wait_for_new_file(server.output, known, lambda: False), server.log()[-4000:]
    time.sleep(rng.uniform(0, WRITING_SECONDS))
    os.kill(server.pid, signal.Signals[name])
    with contextlib.suppress(psutil.TimeoutExpired):
        psutil.Process(server.pid).wait(EXIT_SECONDS)
    server.stop()
    return any(not file.endswith(".safetensors") for file in files_of(server.output))


@pytest.mark.comfyui
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("job", "name", "times"), KILLS)
def test_a_killed_comfyui_damages_nothing_and_the_next_job_cleans_up(server, job, name, times):
    rng = random.Random(f"{job} {name}")
    server.start()
    cut_off = 0
    for number in range(times):
        cut_off += kill(server, job, name, rng)
        server.start()
        server.queue(file_job("small.safetensors", f"next_{number}").prompt)
        files = files_of(server.output)
        assert not [file for file in files if not file.endswith(".safetensors")]
        for file in files:
            assert inspect_file(server.output / file).ok, file
    print(f"{job}, {name}: {times} times, {cut_off} of them left a temporary file at first")
