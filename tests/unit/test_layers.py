"""Selection of layers: families by their keys, presets, patterns, and the rules that always apply."""

import random
from functools import cache

import checkpoints
import pytest
import torch
from stochastic_fp8_pack.kernels.errors import PatternError, UnknownPatternError
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.selection import patterns
from stochastic_fp8_pack.kernels.selection.components import Components, detect_family
from stochastic_fp8_pack.kernels.selection.foreign import diffusers_model
from stochastic_fp8_pack.kernels.selection.patterns import LONGEST_PATTERNS, Pattern, PatternSet
from stochastic_fp8_pack.kernels.selection.presets import DIFFUSION, PRESETS
from stochastic_fp8_pack.kernels.selection.selection import LAYERS, select_layers


def infos(*names, shape=(32, 16), dtype="bfloat16"):
    return {name: TensorInfo(dtype, shape) for name in names}


def of(tensors):
    return {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}


def reasons(tensors, **choices):
    return {name: reason.text for name, reason in select_layers(tensors, **choices).kept}


# Families

FAMILY_KEYS = {
    "flux": ["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight", "time_in.in_layer.weight"],
    "chroma": [
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "img_in.weight",
        "distilled_guidance_layer.norms.0.scale",
    ],
    "qwen_image": [
        *("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),
        "transformer_blocks.0.attn.add_q_proj.weight",
    ],
    "wan": ["head.modulation", "patch_embedding.weight", "blocks.0.ffn.0.weight"],
    "lumina2": ["cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"],
    "ltxv": ["adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight"],
    "sd3": ["joint_blocks.0.context_block.attn.qkv.weight"],
    "hunyuan_video": ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_mod.linear.weight"],
    "hidream": ["caption_projection.0.linear.weight"],
    "sdxl": ["input_blocks.0.0.weight", "label_emb.0.0.weight"],
    "llm": ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.post_attention_layernorm.weight"],
    "clip": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "other_text_encoder": ["encoder.block.0.layer.0.SelfAttention.k.weight"],
    "vae": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "unknown": ["encoder.layer.0.attention.self.query.weight"],
}


@pytest.mark.parametrize(("family", "keys"), FAMILY_KEYS.items())
def test_a_family_is_detected_by_its_keys(family, keys):
    assert Components(infos(*keys)).main.family == family


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("flux", ["double_stream_modulation_img.lin.weight", "img_in.weight"]),
        ("flux", ["double_blocks.0.img_attn.norm.key_norm.weight", "img_in.weight", "time_in.in_layer.weight"]),
        ("chroma", ["distilled_guidance_layer.norms.0.weight", "img_in.weight"]),
        ("llm", ["model.language_model.layers.0.input_layernorm.weight"]),
        ("clip", ["transformer.resblocks.0.ln_1.weight"]),
    ],
)
def test_newer_key_names_are_detected_too(family, keys):
    assert detect_family(infos(*keys)) == family


@pytest.mark.parametrize(("rows", "family"), [(10240, "t5xxl"), (5120, "other_text_encoder")])
def test_t5_xxl_differs_from_t5_xl_in_width(rows, family):
    assert Components(of(checkpoints.t5xxl(rows=rows))).main.family == family


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model."])
@pytest.mark.parametrize("family", ["flux", "wan", "sd3", "sdxl"])
def test_a_family_is_detected_under_every_prefix(family, prefix):
    component = Components(infos(*(prefix + key for key in FAMILY_KEYS[family]))).main
    assert (component.prefix, component.family) == (prefix, family)


def test_an_unknown_network_under_a_prefix():
    assert Components(infos(*(f"net.blocks.{i}.mlp.weight" for i in range(6)))).main.prefix == "net."
    assert Components(infos(*(f"net.blocks.{i}.mlp.weight" for i in range(5)))).main.prefix == ""
    assert Components(infos("model.double_layers.0.weight", "vae.decoder.weight")).main.prefix == "model."
    assert Components(infos("model.double_layers.0.weight")).main.prefix == ""


def test_the_choices_are_auto_all_linear_and_every_family_that_can_be_quantized():
    assert list(LAYERS) == [
        *("auto", "all_linear", "flux", "chroma", "qwen_image", "wan", "lumina2", "ltxv", "sd3", "hunyuan_video"),
        *("hidream", "sdxl", "t5xxl", "llm", "unknown", "anima", "cosmos", "lens", "krea2", "ideogram4", "ernie_image"),
        *("omnigen2", "joyimage", "hidream_o1", "kandinsky5", "pixeldit", "minimax_h3", "seedvr2", "auraflow"),
        *("pixart", "hunyuan_dit", "mochi", "cogvideox", "hunyuan3d", "hunyuan3d_21", "triposplat", "stable_cascade"),
        *("stable_audio", "ace_step", "ace_step_15", "minimax_music3", "measured"),
    ]


# Presets: kept and quantized layers of each family, with the names of published files


@pytest.mark.parametrize(
    ("family", "kept", "quantized"),
    [
        (
            "flux",
            "img_in txt_in time_in.in_layer vector_in.out_layer guidance_in.in_layer final_layer.adaLN_modulation.1 "
            "double_stream_modulation_txt.lin single_stream_modulation.lin",
            "double_blocks.0.img_mod.lin single_blocks.37.linear1 double_blocks.18.txt_attn.qkv",
        ),
        (
            "chroma",
            "distilled_guidance_layer.layers.0.in_layer distilled_guidance_layer.out_proj img_in final_layer.linear",
            "double_blocks.0.img_attn.qkv single_blocks.0.linear2",
        ),
        (
            "qwen_image",
            "img_in txt_in time_text_embed.timestep_embedder.linear_1 norm_out.linear proj_out "
            "transformer_blocks.0.img_mod.1",
            "transformer_blocks.0.txt_mod.1 transformer_blocks.1.img_mod.1 transformer_blocks.59.attn.to_q",
        ),
        (
            "wan",
            "text_embedding.0 time_embedding.2 time_projection.1 img_emb.proj.1 head.head face_adapter.fuser.q "
            "audio_injector.injector.0.q casual_audio_encoder.encoder.linear audio_proj.proj1",
            "blocks.0.self_attn.q blocks.39.ffn.2 blocks.0.cross_attn.k_img",
        ),
        (
            "lumina2",
            "x_embedder cap_embedder.1 t_embedder.mlp.0 layers.0.adaLN_modulation.0 final_layer.linear "
            "context_refiner.0.attention.qkv noise_refiner.1.feed_forward.w1",
            "layers.0.attention.qkv layers.29.feed_forward.w2",
        ),
        (
            "ltxv",
            "adaln_single.linear patchify_proj proj_out caption_projection.linear_1 audio_embeddings_connector.proj "
            "transformer_blocks.0.attn1.to_q transformer_blocks.1.ff.net.2 transformer_blocks.26.attn1.to_q "
            "transformer_blocks.27.attn2.to_v",
            "transformer_blocks.2.attn1.to_q transformer_blocks.25.attn1.to_q transformer_blocks.10.attn1.to_q",
        ),
        (
            "sd3",
            "y_embedder.mlp.0 t_embedder.mlp.2 context_embedder joint_blocks.0.x_block.adaLN_modulation.1 "
            "final_layer.linear",
            "joint_blocks.0.x_block.attn.qkv joint_blocks.37.context_block.mlp.fc1",
        ),
        (
            "hunyuan_video",
            "img_in.proj txt_in.input_embedder time_in.in_layer vector_in.in_layer guidance_in.in_layer byt5_in.fc1 "
            "vision_in.proj.1 time_r_in.in_layer final_layer.linear double_blocks.0.img_mod.linear "
            "double_blocks.0.txt_mod.linear single_blocks.0.modulation.linear",
            "double_blocks.0.img_attn_qkv single_blocks.39.linear1",
        ),
        (
            "hidream",
            "x_embedder.proj t_embedder.timestep_embedder.linear_1 p_embedder.pooled_embedder.linear_1 "
            "caption_projection.0.linear final_layer.linear double_stream_blocks.0.block.ff_i.gate",
            "double_stream_blocks.0.block.ff_i.experts.0.w1 single_stream_blocks.31.block.attn1.to_q "
            "double_stream_blocks.0.block.ff_t.gate",
        ),
        (
            "sdxl",
            "time_embed.0 label_emb.0.2",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q input_blocks.1.0.emb_layers.1 middle_block.1.proj_in",
        ),
        (
            "llm",
            "model.embed_tokens model.norm lm_head visual.blocks.0.attn.qkv vision_model.encoder.layers.0.mlp.fc1 "
            "multi_modal_projector.linear_1",
            "model.layers.0.self_attn.q_proj model.layers.27.mlp.down_proj",
        ),
    ],
)
def test_a_preset_keeps_what_it_says(family, kept, quantized):
    names = [f"{layer}.weight" for layer in f"{kept} {quantized}".split()]
    selection = select_layers(infos(*FAMILY_KEYS[family], shape=(1,)) | infos(*names))
    assert selection.family == family
    assert sorted(selection.quantize) == sorted(f"{layer}.weight" for layer in quantized.split())


def test_t5_xxl_keeps_its_embeddings():
    selection = select_layers(of(checkpoints.t5xxl()))
    assert set(selection.quantize) == {
        "encoder.block.23.layer.1.DenseReluDense.wi_1.weight",
        "encoder.block.0.layer.0.SelfAttention.k.weight",
    }


@pytest.mark.parametrize("family", ["clip", "other_text_encoder", "vae"])
@pytest.mark.parametrize("layers", ["auto", "all_linear", "t5xxl", "sd3"])
def test_clip_other_text_encoders_and_vae_are_never_quantized(family, layers):
    tensors = infos(*FAMILY_KEYS[family], "layers.0.mlp.weight")
    selection = select_layers(tensors, layers=layers)
    assert selection.quantize == ()
    assert {reason.text for _, reason in selection.kept} == {PRESETS[family].reason}


UNKNOWN_KEPT = {
    "pooler.dense": "at the beginning or the end of an unknown network",
    "entry.0": "at the beginning or the end of an unknown network",
    "encoder.layer.0.time_embedder.linear": "kept by pattern '*embed*' of preset unknown",
    "encoder.layer.0.lm_heads.out": "kept by pattern '*head*' of preset unknown",
    "encoder.layer.0.ada_modulation": "kept by pattern '*modulation*' of preset unknown",
    "encoder.layer.0.adaLN.1": "kept by pattern '*adaLN*' of preset unknown",
    "encoder.layer.0.adaln_proj.linear": "kept by pattern '*adaln*' of preset unknown",
    "encoder.layer.0.img_mod.1": "kept by pattern '*_mod' of preset unknown",
    "encoder.layer.0.mod_x": "kept by pattern 'mod_*' of preset unknown",
    "encoder.layer.0.mod_y": "kept by pattern 'mod_*' of preset unknown",
    "encoder.layer.0.modC.1": "kept by pattern 'modC' of preset unknown",
    "encoder.layer.0.modX.1": "kept by pattern 'modX' of preset unknown",
    "encoder.layer.0.modCX.1": "kept by pattern 'modCX' of preset unknown",
}


def test_an_unknown_network_keeps_its_ends_and_what_embeds_or_modulates():
    inner = ["attention.self.query", "attention.norm1.linear", "normal.out", "model.fc1"]
    inner = [f"encoder.layer.{i}.{name}.weight" for name in inner for i in range(3)]
    selection = select_layers(infos(*inner, *(f"{name}.weight" for name in UNKNOWN_KEPT)))
    assert selection.quantize == tuple(inner)
    assert {name.removesuffix(".weight"): reason.text for name, reason in selection.kept} == UNKNOWN_KEPT
    guess = "the model family is unknown: the layers to keep are guessed from their names, and 52 % of the parameters"
    assert any(note.startswith(guess) for note in selection.notes)


@pytest.mark.parametrize("name", ["layers.0.fc.bias", "first_stage_model.decoder.conv_in.weight"])
def test_no_guess_is_noted_that_kept_nothing(name):
    tensors = infos(name) | infos("layers.0.norm.weight", shape=(16,))
    assert not any("guessed" in note for note in select_layers(tensors).notes)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module._orig_mod."])
def test_a_wrappers_name_is_no_reason_to_keep(wrapper):
    names = [f"layers.{i}.fc.weight" for i in range(3)] + ["layers.0.time_embed.weight"]
    selection = select_layers(infos(*(wrapper + name for name in names)))
    assert selection.quantize == tuple(wrapper + name for name in names[:3])


@pytest.mark.parametrize("layers", ["all_linear", "flux"])
def test_no_guess_without_the_preset_of_unknown_networks(layers):
    selection = select_layers(infos("layers.0.fc.weight", "embed.weight"), layers=layers)
    assert selection.quantize == ("layers.0.fc.weight", "embed.weight")
    by_name = "the model family is unknown: names and shapes decide which tensors are Linear layers"
    assert selection.notes == ((by_name,) if layers == "all_linear" else ())


def test_known_modules_are_not_decided_by_names():
    names = ["layers.0.fc", "embed"]
    selection = select_layers(infos(*(f"{n}.weight" for n in names)), layers="all_linear", linear_names=names)
    assert not selection.notes


def test_a_network_without_blocks_keeps_its_first_and_last_tensor():
    tensors = infos("a.weight", "b.weight", "c.weight", "d.weight") | infos("d.bias", shape=(16,))
    assert select_layers(tensors).quantize == ("b.weight", "c.weight")


def test_all_linear_quantizes_everything_possible():
    selection = select_layers(of(checkpoints.sd3()), layers="all_linear")
    assert len(selection.quantize) == 12
    assert {name: reason.text for name, reason in selection.kept} == {
        "joint_blocks.0.x_block.attn.qkv.bias": "not a Linear layer",
        "x_embedder.proj.weight": "not a Linear layer",
    }
    assert selection.pattern_hits == ()


def test_a_preset_can_be_requested_for_an_unknown_network():
    tensors = infos("blocks.0.attn.q.weight", "time_embed.0.weight", "blocks.0.attn.head.out.weight")
    selection = select_layers(tensors, layers="sdxl")
    assert selection.quantize == ("blocks.0.attn.q.weight", "blocks.0.attn.head.out.weight")
    assert selection.notes == ("'time_embed' keeps 33.3 % of the parameters in high precision",)


def test_a_preset_of_another_family_is_noted():
    selection = select_layers(of(checkpoints.sd3()), layers="flux")
    assert "the keys look like SD3, SD3.5, the preset requested is that of flux" in selection.notes


def test_the_preset_of_another_kind_is_noted_as_ignored():
    tensors = of(checkpoints.sd3())
    selection, auto = select_layers(tensors, layers="t5xxl"), select_layers(tensors)
    assert selection.quantize == auto.quantize
    (note,) = set(selection.notes) - set(auto.notes)
    assert note.startswith("layers t5xxl is ignored: it is the preset of a text encoder")
    assert note.endswith("The preset of SD3, SD3.5 applies")


def test_the_unknown_preset_of_a_known_family_is_noted():
    notes = select_layers(of(checkpoints.sd3()), layers="unknown").notes
    assert "the keys look like SD3, SD3.5, the preset requested is that of unknown" in notes
    assert any("guessed from their names" in note for note in notes)
    assert not any("the model family is unknown" in note for note in notes)


def test_an_unknown_choice_of_layers_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown layers 'all': choose one of auto, all_linear, flux"):
        select_layers({}, layers="all")


# Rules that always apply


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("blocks.0.conv.weight", (32, 16, 3, 3), "bfloat16", "not a Linear layer"),
        ("blocks.0.norm.weight", (32,), "bfloat16", "not a Linear layer"),
        ("blocks.0.experts.weight", (4, 32, 16), "bfloat16", "not a Linear layer"),
        ("blocks.0.attn.bias", (32, 16), "bfloat16", "not a Linear layer"),
        ("blocks.0.modulation", (32, 16), "bfloat16", "not a Linear layer"),
        ("weight", (32, 16), "bfloat16", "not a Linear layer"),
        ("model.embed_tokens.weight", (32, 16), "bfloat16", "not a Linear layer"),
        ("shared.weight", (32, 16), "bfloat16", "not a Linear layer"),
        ("text_model.embeddings.token_embedding.weight", (32, 16), "bfloat16", "not a Linear layer"),
        ("text_model.embeddings.position_embedding.weight", (32, 16), "bfloat16", "not a Linear layer"),
        ("embeddings.word_embeddings.weight", (32, 16), "bfloat16", "not a Linear layer"),
        ("motion_encoder.dec.direction.weight", (512, 32), "bfloat16", "not a Linear layer"),
        ("blocks.0.attn.q.weight", (0, 16), "bfloat16", "empty"),
        ("blocks.0.attn.q.weight", (32, 16), "uint8", "uint8 is not a floating-point dtype"),
        ("blocks.0.attn.q.weight", (32, 16), "complex64", "complex64 is not a floating-point dtype"),
        ("blocks.0.attn.q.weight", (32, 16), "float8_e8m0fnu", "float8_e8m0fnu is not a floating-point dtype"),
    ],
)
def test_tensors_that_cannot_be_quantized_are_kept(name, shape, dtype, reason):
    assert reasons(infos(name, shape=shape, dtype=dtype), layers="all_linear") == {name: reason}


@pytest.mark.parametrize("shape", [(32, 24), (8, 16), (2520, 2520)])
@pytest.mark.parametrize("linear_names", [None, {"blocks.0.attn.q"}])
def test_fp8_matmul_takes_only_sides_divisible_by_16(shape, linear_names):
    tensors = infos("blocks.0.attn.q.weight", shape=shape)
    choices = {"layers": "all_linear", "linear_names": linear_names}
    assert select_layers(tensors, **choices).quantize == ("blocks.0.attn.q.weight",)
    assert reasons(tensors, fp8_matmul=True, **choices) == {
        "blocks.0.attn.q.weight": "a side is not divisible by 16, which FP8 matmul needs"
    }
    note = "FP8 matmul needs sides divisible by 16, which leaves 100 % of the parameters in high precision"
    assert note in select_layers(tensors, fp8_matmul=True, **choices).notes


def test_text_encoders_always_need_sides_divisible_by_16():
    """Nothing tells ComfyUI to multiply them in full precision."""
    odd = "model.layers.0.mlp.up_proj.weight"
    tensors = infos(*FAMILY_KEYS["llm"]) | infos(odd, shape=(32, 24))
    assert reasons(tensors)[odd] == "a side is not divisible by 16, which text encoders need"
    assert odd in select_layers(tensors, kind=DIFFUSION, layers="all_linear").quantize


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_every_float_dtype_can_be_quantized(dtype):
    assert select_layers(infos("a.weight", dtype=dtype), layers="all_linear").quantize == ("a.weight",)


def test_known_module_types_override_names():
    tensors = infos("shared.weight", "embedder.weight", "blocks.0.attn.weight")
    selection = select_layers(tensors, layers="all_linear", linear_names={"shared", "blocks.0.attn"})
    assert selection.quantize == ("shared.weight", "blocks.0.attn.weight")
    assert {name: reason.text for name, reason in selection.kept} == {"embedder.weight": "not a Linear layer"}


def test_a_three_dimensional_linear_is_kept():
    tensors = infos("experts.weight", shape=(2, 32, 16))
    assert reasons(tensors, layers="all_linear", linear_names={"experts"}) == {"experts.weight": "not a Linear layer"}


# The user's patterns


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("img_in", "img_in.weight", True),
        ("img_in", "model.diffusion_model.img_in.weight", True),
        ("t_embedder", "context_embedder.weight", False),
        ("attn.qkv", "blocks.0.attn.qkv.weight", True),
        ("attn.qk", "blocks.0.attn.qkv.weight", False),
        ("ttn.qkv", "blocks.0.attn.qkv.weight", False),
        ("blocks.1", "blocks.10.attn.weight", False),
        ("blocks.*.attn", "blocks.10.attn.weight", True),
        ("blocks.*", "blocks.10.attn.weight", True),
        ("*_embed*", "x.time_embedder.0.weight", True),
        ("*.weight", "img_in.weight", True),
        ("*", "a", True),
        ("img*", "img_in.weight", True),
        ("a.*.c", "a.b.b.c", False),
        ("b[0-9]", "b0.weight", False),
        ("b.c", "bxc.weight", False),
        (" img_in ", "img_in.weight", True),
        ("img_in.", "img_in.weight", True),
        ("blocks.0.attn.weight", "blocks.0.attn.weight", True),
    ],
)
def test_a_pattern_is_whole_dotted_parts(pattern, name, matches):
    assert Pattern.parse(pattern).matches(name) == matches


@pytest.mark.parametrize(("pattern", "block"), [("blocks.-1", 27), ("blocks.-2", 26), ("x.blocks.-28", 0)])
def test_a_negative_number_counts_from_the_end(pattern, block):
    names = [f"x.blocks.{i}.attn.weight" for i in range(28)]
    resolved = Pattern.parse(pattern).resolve(names)
    assert [name for name in names if resolved.matches(name)] == [f"x.blocks.{block}.attn.weight"]


@pytest.mark.parametrize(
    ("pattern", "resolved"),
    [
        ("*_blocks.-1.attn", "*_blocks.37.attn"),
        ("double_blocks.-1", "double_blocks.18"),
        ("double_blocks.-20", "double_blocks.-1"),
        ("none.-1", "none.-1"),
        ("-1", "37"),
        ("experts.-1", "experts.7"),
        ("double_blocks.-1.experts.-1", "double_blocks.18.experts.2"),
        ("double_blocks.-" + "9" * 5000, "double_blocks.-" + "9" * 5000),
        ("a-1.-b", "a-1.-b"),
    ],
)
def test_negative_numbers_are_counted_in_the_names(pattern, resolved):
    names = [f"double_blocks.{i}.experts.{i // 6 - 1}" for i in range(19)] + ["double_blocks.1.experts.7"]
    names += [f"single_blocks.{i}.attn" for i in range(38)] + ["double_blocks." + "9" * 5000]
    assert ".".join(Pattern.parse(pattern).resolve(names).parts) == resolved


@pytest.mark.parametrize("pattern", ["", " ", ".", "a..b"])
def test_an_empty_pattern_is_refused(pattern):
    with pytest.raises(PatternError, match="is not a pattern: give whole dotted parts"):
        Pattern.parse(pattern)


def oracle(pattern, name):
    """The definition, spelled out: some window of whole parts, each matched character by character."""

    @cache
    def glob(part, text):
        if not part:
            return not text
        if part[0] == "*":
            return any(glob(part[1:], text[i:]) for i in range(len(text) + 1))
        return bool(text) and part[0] == text[0] and glob(part[1:], text[1:])

    wanted, parts = pattern.split("."), name.split(".")
    windows = [parts[i : i + len(wanted)] for i in range(len(parts) - len(wanted) + 1)]
    return any(all(map(glob, wanted, window)) for window in windows)


@pytest.mark.parametrize("seed", range(20))
def test_patterns_match_what_the_definition_says(seed):
    """Random patterns and names of few characters, one at a time and as a set."""
    draw = random.Random(seed)
    texts = {"".join(draw.choices("ab*.", [3, 3, 3, 2], k=draw.randint(1, 9))).strip(".") for _ in range(40)}
    texts = sorted(text for text in texts if text and ".." not in text)
    names = ["".join(draw.choices("ab.", k=draw.randint(0, 12))) for _ in range(60)]
    together = PatternSet(map(Pattern.parse, texts))
    for name in names:
        expected = [text for text in texts if oracle(text, name)]
        assert [pattern.text for pattern in together.matching(name)] == expected
        assert [text for text in texts if Pattern.parse(text).matches(name)] == expected


LONG = "a" * 199


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*" * 30 + "b", LONG, False),
        ("*" * 30, LONG, True),
        ("*a" * 30 + "*b", LONG, False),
        ("*a" * 198 + "*b*", LONG, False),
        ("*a" * 500, LONG, False),
        ("*a" * 199, LONG, True),
        ("*aa" * 99 + "*", LONG, True),
        ("*ab" * 60 + "*c", "ab" * 99, False),
        (".".join(["*"] * 50 + ["b"]), ".".join("a" * 100), False),
        (".".join(["*a*"] * 50), ".".join("a" * 100), True),
        (".".join(["*"] * 500), ".".join("a" * 100), False),
        ("*" * 1000, LONG, True),
    ],
)
def test_no_pattern_takes_long(pattern, name, matches):
    """Each of these takes years with backtracking, or ten thousand names take minutes."""
    parsed = Pattern.parse(pattern)
    assert {parsed.matches(f"{name}{i}" if matches is False else name) for i in range(10_000)} == {matches}


def test_the_cache_of_a_pattern_is_bounded(monkeypatch):
    monkeypatch.setattr(patterns, "CACHED_PARTS", 3)
    parsed = Pattern.parse("a*.1")
    assert [parsed.matches(f"a{i}.{i}") for i in range(10)] == [False, True] + [False] * 8


@pytest.mark.parametrize("where", ["keep", "only"])
def test_patterns_that_are_too_long_together_are_refused(where):
    longest = ["*" * (LONGEST_PATTERNS - 6), "blocks"]
    tensors = infos(*(f"blocks.{i}.weight" for i in range(4)))
    assert dict(select_layers(tensors, **{where: longest}).pattern_hits)["blocks"] == 4
    with pytest.raises(PatternError, match="have 65,537 characters together; at most 65,536 are allowed"):
        select_layers(tensors, keep=longest, only=["*"])


def test_a_long_pattern_is_shortened_in_its_error():
    with pytest.raises(UnknownPatternError, match=f"pattern '{'x' * 100}…' matches no tensor; a pattern is"):
        select_layers(infos("a.weight"), keep=["x" * 5000])


def test_keep_and_only_narrow_the_choice_and_count_their_hits():
    tensors = of(checkpoints.sd3())
    selection = select_layers(tensors, keep=["fc2"], only=["x_block", "context_embedder"])
    assert selection.quantize == (
        *("joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.x_block.mlp.fc1.weight"),
        *("joint_blocks.1.x_block.attn.qkv.weight", "joint_blocks.1.x_block.mlp.fc1.weight"),
    )
    why = {name: reason.text for name, reason in selection.kept}
    assert why["joint_blocks.0.x_block.mlp.fc2.weight"] == "kept by pattern 'fc2'"
    assert why["joint_blocks.0.context_block.attn.qkv.weight"] == "not named by 'only'"
    assert why["context_embedder.weight"] == "kept by pattern 'context_embedder' of preset sd3"
    assert dict(selection.pattern_hits) == {
        "x_embedder": 0,
        "y_embedder": 0,
        "t_embedder": 0,
        "adaLN_modulation": 2,
        "final_layer": 0,
        "fc2": 2,
        "x_block": 8,
        "context_embedder": 2,
    }


def test_a_users_pattern_may_carry_the_files_prefix():
    tensors = of(checkpoints.sd3("model.diffusion_model."))
    selection = select_layers(tensors, only=["model.diffusion_model.joint_blocks.1"])
    assert len(selection.quantize) == 4


@pytest.mark.parametrize("where", ["keep", "only"])
def test_a_pattern_that_matches_nothing_names_near_matches(where):
    with pytest.raises(
        UnknownPatternError, match="'adaLN_modulatoin' matches no tensor; did you mean adaLN_modulation"
    ):
        select_layers(of(checkpoints.sd3()), **{where: ["adaLN_modulatoin"]})
    with pytest.raises(UnknownPatternError, match=r"did you mean joint_blocks\.0, joint_blocks\.1"):
        select_layers(of(checkpoints.sd3()), **{where: ["joint_block.0"]})
    with pytest.raises(UnknownPatternError, match="'zzz' matches no tensor; a pattern is whole dotted parts"):
        select_layers(of(checkpoints.sd3()), **{where: ["zzz"]})


def test_suffixes_narrow_the_choice():
    selection = select_layers(of(checkpoints.sd3()), suffixes=["qkv.weight", "fc2.weight"])
    assert len(selection.quantize) == 6
    reason = {name: reason.text for name, reason in selection.kept}["joint_blocks.0.x_block.mlp.fc1.weight"]
    assert reason == "the name does not end in qkv.weight or fc2.weight"


def test_a_costly_pattern_is_noted():
    tensors = infos("joint_blocks.0.context_block.attn.qkv.weight", "joint_blocks.0.x_block.adaLN_modulation.1.weight")
    assert "'adaLN_modulation' keeps 50 % of the parameters in high precision" in select_layers(tensors).notes


# All-in-one checkpoints


def test_the_diffusion_model_and_t5_of_an_all_in_one_checkpoint_are_quantized():
    selection = select_layers(of(checkpoints.all_in_one()))
    assert selection.family == "sd3"
    assert [name.split(".")[0] for name in selection.quantize] == ["model"] * 8 + ["text_encoders"] * 2
    why = {name: reason.text for name, reason in selection.kept}
    assert "CLIP-L" in why["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"]
    assert why["first_stage_model.decoder.mid.attn.weight"] == "a VAE is never quantized"
    assert "text_encoders.t5xxl.transformer.* is quantized with the preset of T5-XXL, UMT5-XXL" in selection.notes


@pytest.mark.parametrize(
    ("layers", "text"),
    [("llm", f" with the preset of {PRESETS['llm'].title}"), ("all_linear", ", every Linear layer that FP8 can hold")],
)
def test_the_preset_that_is_used_in_an_all_in_one_checkpoint_is_noted(layers, text):
    notes = select_layers(of(checkpoints.all_in_one()), layers=layers).notes
    (note,) = (note for note in notes if note.startswith("text_encoders.t5xxl"))
    assert note == f"text_encoders.t5xxl.transformer.* is quantized{text}"
    assert not any("ignored" in note for note in notes)


def test_the_tensor_key_is_the_same_alone_and_in_an_all_in_one_checkpoint():
    selection = select_layers(of(checkpoints.all_in_one()))
    keys = [selection.tensor_key(name) for name in selection.quantize]
    alone = select_layers(of(checkpoints.sd3())).quantize + select_layers(of(checkpoints.t5xxl())).quantize
    assert sorted(keys) == sorted(alone)


@pytest.mark.parametrize(
    "prefix", ["cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoder.something."]
)
def test_text_encoders_of_older_checkpoints_are_kept(prefix):
    tensors = infos(
        "model.diffusion_model.input_blocks.0.0.weight", f"{prefix}text_model.encoder.layers.0.mlp.fc1.weight"
    )
    selection = select_layers(tensors, layers="all_linear")
    assert selection.quantize == ("model.diffusion_model.input_blocks.0.0.weight",)


def test_a_tensor_outside_all_networks_is_kept():
    tensors = of(checkpoints.sd3("model.diffusion_model.")) | infos("optimizer.state.weight")
    assert reasons(tensors)["optimizer.state.weight"] == "does not belong to any model in this file"
    assert select_layers(tensors).tensor_key("optimizer.state.weight") == "optimizer.state.weight"


# Diffusers layout


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("Flux", ["x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"]),
        ("AuraFlow", ["joint_transformer_blocks.0.attn.add_k_proj.weight", "single_transformer_blocks.0.ff.weight"]),
        ("Krea 2", ["text_fusion.projector.weight", "transformer_blocks.0.attn.to_gate.weight"]),
        ("Z-Image", ["noise_refiner.0.attention.norm_k.weight"]),
        ("SD3", ["pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"]),
        ("PixArt", ["pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight"]),
        ("Wan", ["condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"]),
        ("LTX", ["time_embed.emb.timestep_embedder.linear_1.weight", "transformer_blocks.0.attn1.to_q.weight"]),
        ("SD 1.x", ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"]),
    ],
)
def test_the_diffusers_layout_is_detected(model, keys):
    for prefix in ("", "model.diffusion_model.", "model.", "net.", "transformer."):
        assert diffusers_model(infos(*(prefix + key for key in keys))).startswith(model)


@pytest.mark.parametrize("keys", FAMILY_KEYS.values())
def test_comfyui_layouts_are_not_detected_as_diffusers(keys):
    assert diffusers_model(infos(*keys, "transformer_blocks.0.attn.add_q_proj.weight")) is None


def test_tensor_info_counts_bytes():
    assert TensorInfo.of(torch.zeros(3, 5, dtype=torch.bfloat16)) == TensorInfo("bfloat16", (3, 5))
    assert TensorInfo("bfloat16", (3, 5)).nbytes == 30
    assert TensorInfo("float4_e2m1fn", (3, 4)).nbytes == 6
    assert TensorInfo("float32", ()).nbytes == 4


def test_many_negative_numbers_are_refused():
    """Each one goes through all names."""
    with pytest.raises(ValueError, match="has more than 2 negative numbers"):
        Pattern.parse("-1." * 333 + "-1").resolve(["blocks.0.attn"])
