"""Makes ComfyUI take the tiny text encoders of tests/tiny_models.py for CLIP-L and T5-XXL.

Their sizes are constants in ComfyUI, not read off the file; every loader in the process, the pack's own included,
then builds the small ones. Real T5-XXL weights would be 10 GB.
"""

import functools

from comfy.sd1_clip import SDClipModel

TINY_CONFIGS = {
    "t5xxl": {"d_ff": 64, "d_kv": 64, "num_heads": 1},
    "clip_l": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "projection_dim": 64,
    },
}


def shrink_text_encoders():
    """Give the named encoders their tiny sizes through ComfyUI's own per-model options."""
    create = SDClipModel.__init__

    @functools.wraps(create)
    def create_tiny(self, *arguments, **keywords):
        options = keywords.get("model_options", {})
        name = options.get("model_name", "clip_l" if keywords.get("textmodel_json_config") is None else None)
        if name in TINY_CONFIGS:
            keywords["model_options"] = {**options, f"{name}_model_config": TINY_CONFIGS[name]}
        create(self, *arguments, **keywords)

    SDClipModel.__init__ = create_tiny
