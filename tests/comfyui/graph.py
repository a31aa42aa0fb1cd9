"""Writes prompts in ComfyUI's API format without counting node ids.

graph = Graph()
model = graph.add("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")
graph.add("SaveImage", images=decoded[0], filename_prefix="x")
server.queue(graph.prompt)
"""


class Node:
    """A node of a graph. ``node[i]`` is its i-th output, ``node.id`` its key in the prompt and in the results."""

    def __init__(self, node_id):
        self.id = node_id

    def __getitem__(self, output):
        return [self.id, output]


class Graph:
    """A prompt under construction."""

    def __init__(self):
        self.prompt = {}

    def add(self, class_type, **inputs):
        """Add a node. An input is a literal, another node's output, or a Node, which means its first output."""
        node = Node(str(len(self.prompt) + 1))
        wired = {name: value[0] if isinstance(value, Node) else value for name, value in inputs.items()}
        self.prompt[node.id] = {"class_type": class_type, "inputs": wired}
        return node

    def sample(self, model, positive, negative, latent, *, seed=42, steps=2, cfg=1.0):
        """Add a KSampler (euler, simple) over the whole range."""
        return self.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
