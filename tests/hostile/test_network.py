"""Nothing leaves the machine: the command opens no socket, and a ComfyUI with the pack only its own."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import sd3
from comfyui.graph import Graph
from comfyui.pack import FILE_OPTIONS, RECIPE, Bench, quantize, save
from comfyui.server import HOST, PACK_FOLDER, ComfyUIServer, comfyui_python
from conftest import PACK_ROOT
from hostile.amounts import WHOLE, amount
from safetensors.torch import save_file

TRACE = Path(__file__).resolve().parent / "network_trace"
OUTGOING = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.gethostbyname", "socket.gethostbyaddr")
IPV6_PROBE = repr(("::1", 0))
"""What urllib3, which ComfyUI imports, binds for a moment to learn whether this machine has IPv6."""
STRACE = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg,bind", "-e", "signal=none"]


def environment(trace):
    """Variables with which a Python process writes its network events to a file."""
    path = os.pathsep.join(filter(None, (str(TRACE), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "NETWORK_TRACE": str(trace)}


def events(trace):
    return [json.loads(line) for line in trace.read_text().splitlines()]


def addresses(trace):
    """Network addresses that strace saw, as lines of its output; local sockets are left out."""
    return [line for line in trace.read_text().splitlines() if re.search(r"sa_family=AF_INET6?,", line)]


@pytest.fixture
def source(tmp_path):
    save_file(sd3(), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def commands(source):
    target = source.with_name("out.safetensors")
    return [
        [source, target, "--overwrite", "--plot", "--debug"],
        [source, target, "--dry-run"],
        ["inspect", source, "--deep"],
        ["compare", source, "--json"],
    ]


def run(arguments, variables, before=()):
    command = [*before, sys.executable, "-m", "kernels", *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=PACK_ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_trace_sees_a_connection(tmp_path):
    code = "import socket; socket.create_server(('127.0.0.1', 0)).getsockname()"
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment(tmp_path / "trace")}, check=True, timeout=60
    )
    assert "socket.bind" in {event["event"] for event in events(tmp_path / "trace")}


@pytest.mark.parametrize("number", amount([0], range(4)))
def test_the_command_opens_no_socket(source, tmp_path, number):
    run(commands(source)[number], environment(tmp_path / "trace"))
    assert events(tmp_path / "trace") == []


@pytest.mark.skipif(not WHOLE, reason="takes a moment: make hostile")
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_the_command_makes_no_network_call_to_the_kernel(source, tmp_path):
    """Native libraries are seen as well."""
    if subprocess.run([*STRACE, "-o", tmp_path / "try", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process be traced")
    run(commands(source)[0], {}, [*STRACE, "-o", tmp_path / "trace"])
    assert addresses(tmp_path / "trace") == []


def work(server):
    """What users do: plan, quantize a model and a file, save, inspect, compare, and look at the page."""
    bench = Bench(server)
    bench.model_file("sd3")
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="sd3.safetensors", weight_dtype="default")
    quantized = quantize(graph, model)
    save(graph, "saved", model=quantized)
    graph.add("StochasticFP8LayerReport", report=quantized[1])
    file = {"file": "diffusion_models/sd3.safetensors"}
    graph.add("StochasticFP8QuantizeFile", **file, filename_prefix="file", **RECIPE, **FILE_OPTIONS)
    graph.add("StochasticFP8Inspect", **file, filename_prefix="repaired", deep=True, repair=False)
    server.queue(graph.prompt)
    for script in server.get("/extensions"):
        if PACK_FOLDER in script:
            server.get(script)


@pytest.mark.comfyui
def test_comfyui_with_the_pack_opens_only_its_own_socket(tmp_path):
    trace = tmp_path / "trace"
    with ComfyUIServer(tmp_path / "base", environment=environment(trace)) as server:
        work(server)
        port = server.port
    seen = events(trace)
    bound = {event["arguments"][1] for event in seen if event["event"] == "socket.bind"}
    assert bound - {IPV6_PROBE} == {repr((HOST, port))}
    assert [event for event in seen if event["event"] in OUTGOING] == []
    looked_up = {event["arguments"][0] for event in seen if event["event"] == "socket.getaddrinfo"}
    assert looked_up <= {repr(HOST), "None"}
    assert [event for event in seen if any(PACK_FOLDER in file for file in event["files"])] == []


@pytest.mark.comfyui
@pytest.mark.skipif(not WHOLE, reason="takes a minute: make hostile")
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_comfyui_with_the_pack_makes_no_network_call_to_the_kernel(tmp_path, monkeypatch):
    if subprocess.run([*STRACE, "-o", tmp_path / "try", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process be traced")
    trace, wrapper = tmp_path / "trace", tmp_path / "python"
    wrapper.write_text(f"#!/bin/sh\nexec {' '.join(STRACE)} -o '{trace}' '{comfyui_python()}' \"$@\"\n")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("COMFYUI_PYTHON", str(wrapper))
    with ComfyUIServer(tmp_path / "base") as server:
        work(server)
        port = server.port
    own = re.compile(rf'bind\(.*htons\(({port}|0)\).*"({re.escape(HOST)}|::1)"')
    assert [line for line in addresses(trace) if not own.search(line)] == []
