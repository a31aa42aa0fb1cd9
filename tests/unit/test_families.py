"""Presets against the names and shapes of published models, from key_lists.txt."""

import key_lists
import pytest
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.selection.components import Components, detect_family
from stochastic_fp8_pack.kernels.selection.foreign import diffusers_model, foreign_kind, other_quantizer
from stochastic_fp8_pack.kernels.selection.presets import DIFFUSION, PRESETS, TEXT_ENCODER
from stochastic_fp8_pack.kernels.selection.selection import select_layers
from tools import presets_page

MODELS = key_lists.read()

FAMILIES = {
    "flux": "Flux FluxSchnell LongCatImage Flux2",
    "chroma": "Chroma ChromaRadiance",
    "qwen_image": "QwenImage MageFlow",
    "wan": "WAN21_T2V WAN21_I2V WAN22_T2V WAN21_FunControl2V WAN21_Vace WAN21_Camera WAN22_Camera WAN22_S2V "
    "WAN21_HuMo WAN22_Animate WAN21_SCAIL WAN21_SCAIL2 WAN22_WanDancer",
    "lumina2": "ZImage ZImagePixelSpace Lumina2",
    "ltxv": "LTXV LTXAV",
    "sd3": "SD3",
    "hunyuan_video": "HunyuanVideo HunyuanVideo15 HunyuanImage21 HunyuanImage21Refiner",
    "hidream": "HiDream",
    "sdxl": "SD15 LotusD Stable_Zero123 SDXL SVD_img2vid",
    "anima": "Anima CosmosT2IPredict2",
    "cosmos": "CosmosT2V",
    "lens": "Lens",
    "krea2": "Krea2",
    "ideogram4": "Ideogram4",
    "ernie_image": "ErnieImage",
    "omnigen2": "Omnigen2 Boogu",
    "joyimage": "JoyImage",
    "hidream_o1": "HiDreamO1",
    "kandinsky5": "Kandinsky5 Kandinsky5Image",
    "pixeldit": "PixelDiTT2I PiD",
    "minimax_h3": "MiniMaxH3",
    "seedvr2": "SeedVR2",
    "auraflow": "AuraFlow",
    "pixart": "PixArtAlpha PixArtSigma",
    "hunyuan_dit": "HunyuanDiT HunyuanDiT1",
    "mochi": "GenmoMochi",
    "cogvideox": "CogVideoX_T2V",
    "hunyuan3d": "Hunyuan3Dv2 Hunyuan3Dv2mini",
    "hunyuan3d_21": "Hunyuan3Dv2_1",
    "triposplat": "TripoSplat",
    "stable_cascade": "Stable_Cascade_C Stable_Cascade_B",
    "stable_audio": "StableAudio",
    "ace_step": "ACEStep",
    "ace_step_15": "ACEStep15",
    "minimax_music3": "MiniMaxMusic3",
}
"""Family -> the classes in comfy.supported_models whose models it is for."""

FAMILY_OF = {name: family for family, names in FAMILIES.items() for name in names.split()}

UNSEEN = {
    "cogvideox": {"ofs_embedding_linear_*"},
    "hunyuan3d": {"guidance_in"},
    "stable_audio": {"to_prepend_embed", "global_cond_embedder"},
}
"""Patterns for models that no list is of: CogVideoX image to video, Hunyuan3D 2 Turbo, Stable Audio 3."""


def infos(model, prefix=""):
    return {prefix + name: TensorInfo("bfloat16", shape) for name, shape in MODELS[model].shapes.items()}


def test_every_family_has_a_published_model():
    diffusion = {family for family, preset in PRESETS.items() if preset.kind == DIFFUSION and family != "unknown"}
    assert FAMILIES.keys() == diffusion
    assert {keys.comfy_class for keys in MODELS.values()} == FAMILY_OF.keys()


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_of_one_family_only(model):
    tensors = infos(model)
    alone = [
        family
        for family, preset in PRESETS.items()
        for keys in preset.detect
        if all(key in tensors and size in (None, tensors[key].shape[0]) for key, size in keys.items())
    ]
    assert {*alone} == {FAMILY_OF[MODELS[model].comfy_class]}
    assert not diffusers_model(tensors) and not foreign_kind(tensors, f"{model}.safetensors")
    assert not other_quantizer(tensors)


@pytest.mark.parametrize("prefix", ["", "model.", "net.", "model.diffusion_model."])
@pytest.mark.parametrize("model", ["hidream_o1", "anima", "ernie_image", "ace_step_15", "stable_audio_1", "cascade_b"])
def test_a_published_prefix_changes_nothing(model, prefix):
    components = Components(infos(model, prefix))
    assert (components.main.prefix, components.main.family) == (prefix, FAMILY_OF[MODELS[model].comfy_class])
    assert not components.others and not components.undetected_prefix


def test_hidream_o1_holds_an_llm_but_is_none():
    tensors = infos("hidream_o1", "model.")
    assert detect_family(tensors, kinds=(TEXT_ENCODER,)) == "llm"
    assert Components(tensors).main.family == "hidream_o1"


UNUSABLE = {
    "pixeldit": {f"core.pixel_blocks.{i}.adaLN_modulation.0.weight" for i in (0, 1)},
    "pid": {f"pixel_blocks.{i}.adaLN_modulation.0.weight" for i in (0, 1)},
    "hunyuan3d_21": {"x_embedder.weight", "t_embedder.mlp.0.weight"}
    | {f"blocks.{i}.attn2.to_k.weight" for i in range(21)},
}
"""Model -> Linear weights that some ComfyUI cannot load or run in FP8."""


@pytest.mark.parametrize("model", MODELS)
def test_all_linear_quantizes_the_linear_layers_that_comfyui_can_run(model):
    keys = MODELS[model]
    chosen = {*select_layers(infos(model), layers="all_linear").quantize}
    assert chosen == keys.linear - UNUSABLE.get(model, set())


@pytest.mark.parametrize("layers", ["auto", "all_linear", "flux"])
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("pixeldit", "pixel_blocks.0.adaLN_modulation.0"),
        ("pixeldit", "pixel_blocks.0.adaLN_modulation_msa"),
        ("pid", "pixel_blocks.0.adaLN_modulation_mlp"),
        ("wan22_wandancer", "music_encoder.0.self_attn.q_proj"),
    ],
)
def test_what_comfyui_cuts_is_kept_in_file_and_graph(model, name, layers):
    """The graph has what the loader made of it: `_msa` and `_mlp`, `q_proj` and others."""
    tensors = infos(model) | {f"{name}.weight": TensorInfo("bfloat16", (256, 256))}
    for known in (None, {name}):
        kept = dict(select_layers(tensors, layers=layers, linear_names=known).kept)
        reason = kept[f"{name}.weight"].text
        assert reason == "ComfyUI cuts this layer and its scale into pieces while it loads the file"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pattern_is_for_some_model(family):
    unused = {*PRESETS[family].keep}
    for keys in MODELS.values():
        if FAMILY_OF[keys.comfy_class] == family:
            alike = {name: TensorInfo("bfloat16", (16, 16)) for name in keys.shapes}  # convolutions count, too
            unused -= {pattern for pattern, hits in select_layers(alike).pattern_hits if hits}
    assert unused == UNSEEN.get(family, set())


def test_the_page_is_what_the_table_and_the_models_say():
    assert presets_page.table() in presets_page.PAGE.read_text(), "run: cd tests && python -m tools.presets_page"
