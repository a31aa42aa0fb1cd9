"""Runs the example *Try it now* in a real ComfyUI and prints its results: ``make demo``.

The images and the quantized model are written to .build/demo.
"""

import math
import shutil
import time

import tiny_models
from comfyui.server import PACK_ROOT, ComfyUIServer
from comfyui.workflows import read_workflow, to_prompt
from PIL import ImageChops, ImageStat
from safetensors.torch import load_file
from tqdm import tqdm

FOLDER = PACK_ROOT / ".build" / "demo"


class ProgressBar:
    """Shows how many nodes of a run are done, and the progress of the current one."""

    def __init__(self, prompt):
        self._names = {node: entry["class_type"] for node, entry in prompt.items()}
        self._bar = tqdm(total=len(prompt), unit="node", bar_format="{l_bar}{bar}| {n:.1f}/{total} nodes {postfix}")
        self._done = 0

    def __call__(self, event, data):
        node = data.get("display_node") or data.get("node")
        if event == "executing" and node:
            self._bar.set_postfix_str(self._names.get(node, ""))
        elif event == "executed" or (event == "progress" and data["value"] == data["max"]):
            self._done += 1
            self._show(self._done)
        elif event == "progress":
            self._show(self._done + data["value"] / data["max"])

    def close(self):
        self._show(self._bar.total)
        self._bar.set_postfix_str("")
        self._bar.close()

    def _show(self, nodes):
        self._bar.n = min(nodes, self._bar.total)
        self._bar.refresh()


def sampled_model(prompt, source):
    """The id of the sampler whose model comes from a node of type ``source``."""
    sources = {node for node, entry in prompt.items() if entry["class_type"] == source}
    return next(
        node
        for node, entry in prompt.items()
        if entry["class_type"] == "KSampler" and entry["inputs"]["model"][0] in sources
    )


def run_example(server):
    """Run the example. Returns (outputs by type of the node that made them, the FP8 model's latents, the prompt)."""
    prompt = to_prompt(read_workflow("1 Try it now"), server.object_info())
    sampler = sampled_model(prompt, "StochasticFP8Quantize")
    prompt["keep"] = keep_latents(sampler)
    prompt["sheet"] = preview_of(prompt, "StochasticFP8ImageCompare")
    bar = ProgressBar(prompt)
    entry = server.queue(prompt, on_event=bar)
    bar.close()
    outputs = {}
    for node, output in entry["outputs"].items():
        outputs.setdefault(maker(prompt, node), {}).update(output)
    return outputs, latents(server, entry), prompt


def preview_of(prompt, type_):
    """A PreviewImage for the first output of the node of that type."""
    (source,) = (node for node, entry in prompt.items() if entry["class_type"] == type_)
    return {"class_type": "PreviewImage", "inputs": {"images": [source, 0]}}


def maker(prompt, node):
    """The type of a node; for a PreviewImage, the type of the node whose image it shows."""
    source = prompt[node]["inputs"]["images"][0] if prompt[node]["class_type"] == "PreviewImage" else node
    return prompt[source]["class_type"]


def made_pictures(server, outputs):
    """The images of the example by file name."""
    compared, histogram = outputs["StochasticFP8ImageCompare"], outputs["StochasticFP8ErrorHistogram"]
    shown = {
        "before": compared["a_images"],
        "after": compared["b_images"],
        "compared": compared["images"],
        "error_histogram": histogram["images"],
    }
    return {title: server.view(images[0]).convert("RGB") for title, images in shown.items()}


def keep_latents(sampler):
    return {"class_type": "TestSaveTensor", "inputs": {"name": "latents.safetensors", "latent": [sampler, 0]}}


def latents(server, entry):
    (path,) = server.files(entry, "keep", "tensors")
    return load_file(path)["samples"]


def run_reloaded(server, prompt, name):
    """The latents of the same run with the saved file, loaded by ComfyUI's own loader."""
    sampler = sampled_model(prompt, "StochasticFP8Quantize")
    loader = {"class_type": "UNETLoader", "inputs": {"unet_name": name, "weight_dtype": "default"}}
    inputs = {**prompt[sampler]["inputs"], "model": ["reloaded", 0]}
    needed = {value[0] for value in inputs.values() if isinstance(value, list)} - {"reloaded"}
    reloaded = {node: prompt[node] for node in needed}
    reloaded |= {"reloaded": loader, sampler: {**prompt[sampler], "inputs": inputs}, "keep": keep_latents(sampler)}
    return latents(server, server.queue(reloaded))


def psnr(one, other):
    """In dB, of two images with 8 bits per channel."""
    squared = ImageStat.Stat(ImageChops.difference(one, other)).sum2
    error = sum(squared) / (3 * one.width * one.height)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def megabytes(path):
    return f"{path.stat().st_size / 1e6:.2f} MB"


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    print("Starting ComfyUI …", flush=True)
    with ComfyUIServer(FOLDER / "comfyui") as server:
        started = time.monotonic()
        outputs, in_graph, prompt = run_example(server)
        seconds = time.monotonic() - started
        pictures = made_pictures(server, outputs)
        name = outputs["StochasticFP8Save"]["text"][0]
        saved = shutil.copy(server.output / "diffusion_models" / name, FOLDER)
        same = bool((run_reloaded(server, prompt, name) == in_graph).all())
    for title, picture in pictures.items():
        picture.save(FOLDER / f"{title}.png")
    print(f"\nTry it now: {seconds:.1f} s")
    print(f"  model before     {tiny_models.LANDSCAPES}  {megabytes(tiny_models.LANDSCAPES)}")
    print(f"  model after      {saved}  {megabytes(FOLDER / name)}")
    print(f"  image before     {FOLDER / 'before.png'}")
    print(f"  image after      {FOLDER / 'after.png'}")
    print(f"  comparison       {FOLDER / 'compared.png'}")
    print(f"  error histogram  {FOLDER / 'error_histogram.png'}")
    print(f"  PSNR             {psnr(pictures['before'], pictures['after']):.1f} dB")
    print(f"  reloaded file    {'gives the same image, bit for bit' if same else 'gives a DIFFERENT image'}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
