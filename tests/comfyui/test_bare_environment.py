"""Without matplotlib and Triton the pack loads and works, and nodes that need them say what to install."""

import os

import pytest
from comfyui.graph import Graph
from comfyui.pack import Bench, quantize, save
from comfyui.server import ComfyUIServer, ExecutionError
from safetensors.torch import load_file

MISSING = ("matplotlib", "triton")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A server whose Python cannot import these packages, and which embeds no workflows."""
    folder = tmp_path_factory.mktemp("missing")
    for package in MISSING:
        (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('none here', name={package!r})\n")
    environment = {"PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))}
    with ComfyUIServer(
        tmp_path_factory.mktemp("bare"), arguments=["--disable-metadata"], environment=environment
    ) as server:
        yield Bench(server)


def test_all_nodes_load(bare):
    nodes = {name for name in bare.server.object_info() if name.startswith("StochasticFP8")}
    assert nodes >= {
        "StochasticFP8Quantize",
        "StochasticFP8QuantizeTextEncoder",
        "StochasticFP8QuantizeFile",
        "StochasticFP8Save",
        "StochasticFP8Inspect",
        "StochasticFP8DemoModel",
    }


def test_quantizing_and_saving_work_without_them(bare):
    graph = Graph()
    demo = graph.add("StochasticFP8DemoModel", scene="night")
    path = bare.saved(bare.texts(graph, save(graph, "bare", model=quantize(graph, demo)))[0])
    assert "joint_blocks.0.x_block.attn.qkv.weight" in load_file(path)


def test_no_workflow_with_disable_metadata(bare):
    graph = Graph()
    demo = graph.add("StochasticFP8DemoModel", scene="dusk")
    saver = save(graph, "private", model=quantize(graph, demo))
    entry = bare.server.queue(graph.prompt, workflow={"nodes": ["secret"]})
    content = bare.saved(entry["outputs"][saver.id]["text"][0]).read_bytes()
    assert b"secret" not in content
    assert b"StochasticFP8DemoModel" not in content
    assert b"stochastic_fp8" in content


def test_a_picture_says_what_to_install(bare):
    bare.model_file("sd3")
    graph = Graph()
    graph.add(
        "StochasticFP8Inspect",
        file="diffusion_models/sd3.safetensors",
        deep=False,
        repair=False,
        filename_prefix="repaired",
    )
    with pytest.raises(ExecutionError, match="pip install matplotlib"):
        bare.server.queue(graph.prompt)
