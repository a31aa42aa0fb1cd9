"""Tiny Landscape Model: its VAE decodes only, and says so."""

import pytest
import torch
from comfyui.graph import Graph
from comfyui.pack import log_since, quantize, save
from comfyui.server import ExecutionError


def demo_model():
    graph = Graph()
    return graph, graph.add("StochasticFP8DemoModel", scene="dusk")


def test_loading_logs_nothing_missing(bench):
    graph, model = demo_model()
    bench.server.free()
    mark = len(bench.server.log())
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    image = graph.add("VAEDecode", samples=latent, vae=model[3])
    assert bench.run(graph, bench.keep(graph, image, as_="image")).shape == (1, 64, 64, 3)
    assert "missing" not in log_since(bench.server, mark).lower()


@pytest.mark.parametrize("encode", ["VAEEncode", "VAEEncodeTiled"])
def test_encoding_is_an_error(bench, encode):
    graph, model = demo_model()
    pixels = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8} if "Tiled" in encode else {}
    latent = graph.add(encode, pixels=pixels, vae=model[3], **tiles)
    bench.keep(graph, latent)
    with pytest.raises(ExecutionError, match="the VAE of the Tiny Landscape Model decodes only"):
        bench.server.queue(graph.prompt)


def test_a_checkpoint_with_the_vae_decodes_the_same(bench):
    graph, model = demo_model()
    save(graph, "demo_with_vae", layout="legacy", model=quantize(graph, model), vae=model[3])
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    kept = bench.keep(graph, graph.add("VAEDecode", samples=latent, vae=model[3]), as_="image")
    expected = bench.run(graph, kept)
    (name,) = (path.name for path in bench.saved("", "checkpoints").glob("demo_with_vae*"))
    graph = Graph()
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    vae = graph.add("CheckpointLoaderSimple", ckpt_name=name)[2]
    kept = bench.keep(graph, graph.add("VAEDecode", samples=latent, vae=vae), as_="image")
    assert torch.equal(bench.run(graph, kept), expected)
