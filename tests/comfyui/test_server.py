"""The test bench itself: a real ComfyUI runs the tiny models with its own nodes, and errors reach the tests."""

import shutil

import pytest
import tiny_models
from comfyui.graph import Graph
from comfyui.server import ComfyUIServer, ExecutionError, ExecutionInterrupted, PromptRejected
from safetensors.torch import load_file


def finite_nonzero(tensor):
    return bool(tensor.isfinite().all()) and float(tensor.std()) > 0


def run_and_load(comfyui, graph, saver):
    """Run a graph. Returns the tensor that its TestSaveTensor node wrote."""
    entry = comfyui.queue(graph.prompt)
    (path,) = comfyui.files(entry, saver.id, "tensors")
    return load_file(path)["samples"]


def sample_sd3(graph, model, **sampler):
    conditioning = graph.add("TestRandomConditioning", seed=1, tokens=8, width=64, pooled_width=64)
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    return graph.sample(model, conditioning, conditioning, latent, **sampler)


@pytest.fixture(scope="module")
def sd3(comfyui):
    return tiny_models.write_sd3(comfyui.models("diffusion_models") / "tiny_sd3.safetensors").name


def test_sd3_samples(comfyui, sd3):
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=sd3, weight_dtype="default")
    saver = graph.add("TestSaveTensor", name="sd3.safetensors", latent=sample_sd3(graph, model))
    samples = run_and_load(comfyui, graph, saver)
    assert samples.shape == (1, 16, 16, 16)
    assert finite_nonzero(samples)


def test_sd3_lora_changes_the_result(comfyui, sd3):
    lora = tiny_models.write_sd3_lora(comfyui.models("loras") / "tiny_lora.safetensors")
    graph = Graph()
    plain = graph.add("UNETLoader", unet_name=sd3, weight_dtype="default")
    patched = graph.add("LoraLoaderModelOnly", model=plain, lora_name=lora.name, strength_model=1.0)
    savers = [
        graph.add("TestSaveTensor", name=f"lora_{i}.safetensors", latent=sample_sd3(graph, model))
        for i, model in enumerate((plain, patched))
    ]
    entry = comfyui.queue(graph.prompt)
    without, with_lora = (load_file(comfyui.files(entry, saver.id, "tensors")[0])["samples"] for saver in savers)
    assert finite_nonzero(with_lora)
    assert (without - with_lora).abs().max() > 1e-3
    assert "lora key not loaded" not in comfyui.log()


def test_wan_samples(comfyui):
    name = tiny_models.write_wan(comfyui.models("diffusion_models") / "tiny_wan.safetensors").name
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=name, weight_dtype="default")
    conditioning = graph.add("TestRandomConditioning", seed=1, tokens=8, width=4096, pooled_width=0)
    latent = graph.add("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    sampled = graph.sample(model, conditioning, conditioning, latent)
    saver = graph.add("TestSaveTensor", name="wan.safetensors", latent=sampled)
    samples = run_and_load(comfyui, graph, saver)
    assert samples.shape == (1, 16, 2, 8, 8)
    assert finite_nonzero(samples)


def test_all_in_one_checkpoint_makes_an_image(comfyui):
    name = tiny_models.write_sd3_checkpoint(comfyui.models("checkpoints") / "tiny_all.safetensors").name
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    prompt = graph.add("CLIPTextEncode", clip=checkpoint[1], text="a lake at dawn")
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    sampled = graph.sample(checkpoint, prompt, prompt, latent)
    image = graph.add("VAEDecode", samples=sampled, vae=checkpoint[2])
    graph.add("SaveImage", images=image, filename_prefix="all_in_one")
    entry = comfyui.queue(graph.prompt)
    (picture,) = [image for output in entry["outputs"].values() for image in output["images"]]
    assert comfyui.view(picture).size == (128, 128)


@pytest.mark.parametrize("write", [tiny_models.write_clip_l, tiny_models.write_t5xxl])
def test_text_encoders_encode(comfyui, write):
    name = write(comfyui.models("text_encoders") / f"{write.__name__}.safetensors").name
    graph = Graph()
    clip = graph.add("CLIPLoader", clip_name=name, type="sd3", device="default")
    encoded = graph.add("CLIPTextEncode", clip=clip, text="a lake at dawn")
    saver = graph.add("TestSaveConditioning", name="conditioning.safetensors", conditioning=encoded)
    conditioning = run_and_load(comfyui, graph, saver)
    assert conditioning.shape == (1, 77, 4096)
    assert finite_nonzero(conditioning)
    assert "clip missing" not in comfyui.log()
    assert "clip unexpected" not in comfyui.log()


def test_landscapes_have_the_light_of_their_scene(comfyui):
    """With the shipped models, dawn is brighter than night and in colour."""
    for folder, source in (
        (comfyui.models("diffusion_models"), tiny_models.LANDSCAPES),
        (comfyui.models("vae"), tiny_models.LANDSCAPES_VAE),
        (comfyui.base / "input", tiny_models.LANDSCAPES_CONDITIONING),
    ):
        shutil.copy(source, folder)
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=tiny_models.LANDSCAPES.name, weight_dtype="default")
    vae = graph.add("VAELoader", vae_name=tiny_models.LANDSCAPES_VAE.name)
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=1)
    savers = {}
    for word in ("dawn", "night"):
        positive = graph.add("TestFileConditioning", file=tiny_models.LANDSCAPES_CONDITIONING.name, word=word)
        negative = graph.add("ConditioningZeroOut", conditioning=positive)
        sampled = graph.sample(model, positive, negative, latent, steps=8, cfg=2.5)
        image = graph.add("VAEDecode", samples=sampled, vae=vae)
        savers[word] = graph.add("TestSaveTensor", name=f"{word}.safetensors", image=image)
    entry = comfyui.queue(graph.prompt)
    images = {
        word: load_file(comfyui.files(entry, saver.id, "tensors")[0])["samples"] for word, saver in savers.items()
    }
    assert images["dawn"].shape == (1, 256, 256, 3)
    assert images["dawn"].mean() > 2 * images["night"].mean()
    assert images["dawn"].mean((0, 1, 2)).std() > 0.02


def test_a_rejected_prompt_names_the_input(comfyui):
    graph = Graph()
    latent = graph.add("EmptySD3LatentImage", width="wide", height=64, batch_size=1)
    graph.add("TestSaveTensor", name="x.safetensors", latent=latent)
    with pytest.raises(PromptRejected) as rejected:
        comfyui.queue(graph.prompt)
    assert "width" in str(rejected.value.node_errors)


def test_a_failing_node_carries_its_message(comfyui):
    graph = Graph()
    graph.add("TestSaveTensor", name="x.safetensors", latent=graph.add("TestFail", message="no such lake"))
    with pytest.raises(ExecutionError) as failed:
        comfyui.queue(graph.prompt)
    assert (failed.value.message, failed.value.type) == ("no such lake", "ValueError")


def test_a_run_can_be_interrupted(comfyui):
    graph = Graph()
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    waiting = graph.add("TestWait", latent=latent, seconds=20.0)
    graph.add("TestSaveTensor", name="x.safetensors", latent=waiting)
    seen = []

    def interrupt_once(kind, data):
        if kind == "progress" and not seen:
            seen.append(data["value"])
            comfyui.interrupt()

    with pytest.raises(ExecutionInterrupted):
        comfyui.queue(graph.prompt, on_event=interrupt_once)
    assert seen


def test_the_server_stops_and_leaves_no_process(tmp_path):
    with ComfyUIServer(tmp_path, with_pack=False) as server:
        process = server._process
        assert "TestFail" in server.object_info()
        assert process.poll() is None
    assert process.poll() is not None
