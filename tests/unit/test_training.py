"""The training script of the demo model makes what ships: the same networks, words and kind of pictures."""

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tools.training.landscapes import SCENES, Painter
from tools.training.networks import MMDiT, decoder, word_tensors


def test_the_transformer_has_the_shipped_tensors():
    shipped = load_file(tiny_models.LANDSCAPES)
    ours = MMDiT().state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in shipped.items()}
    assert torch.equal(ours["pos_embed"].bfloat16(), shipped["pos_embed"])


def test_the_decoder_has_the_shipped_tensors():
    shipped = {
        name.removeprefix("taesd_decoder."): tensor.shape
        for name, tensor in load_file(tiny_models.LANDSCAPES_VAE).items()
        if name.startswith("taesd_decoder.")
    }
    assert {name: tensor.shape for name, tensor in decoder().state_dict().items()} == shipped


@pytest.mark.parametrize("scene", SCENES)
def test_a_word_is_its_shipped_tensors(scene):
    shipped = load_file(tiny_models.LANDSCAPES_CONDITIONING)
    cond, pooled = word_tensors(scene)
    assert torch.equal(cond, shipped[f"{scene}.cond"])
    assert torch.equal(pooled, shipped[f"{scene}.pooled_output"])


def test_pictures_look_like_their_scene():
    torch.manual_seed(0)
    pictures, scenes = Painter(4).paint(torch.arange(4))
    assert pictures.shape == (4, 3, 256, 256)
    assert pictures.amin() >= 0
    assert pictures.amax() <= 1
    assert scenes.tolist() == [0, 1, 2, 3]
    brightness = pictures.mean((1, 2, 3))
    assert brightness.argmax() == SCENES.index("day")
    assert brightness.argmin() == SCENES.index("night")
    red, _, blue = pictures[:, :, :100].mean((2, 3)).unbind(1)
    assert blue[SCENES.index("day")] > red[SCENES.index("day")]
    assert red[SCENES.index("dusk")] > blue[SCENES.index("dusk")]
