"""Quantization reports of small random tensors, for the tests of figures and tables."""

from dataclasses import replace

import torch
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels import KeptTensor, LayerReport, Recipe, Report, quantize_tensor
from stochastic_fp8_pack.kernels.selection.reasons import NOT_LINEAR, Reason
from tiny_models import LANDSCAPES


def heavy_tailed(seed, *shape):
    """Student-t numbers with 4 degrees of freedom in bf16: mostly small, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator)
    chi_square = torch.randn(4, *shape, generator=generator).square().sum(0)
    return (normal / (chi_square / 4).sqrt()).bfloat16()


def quantized_layer(key, weight, **recipe):
    quantized = quantize_tensor(weight, key=key, statistics=True, **recipe)
    return LayerReport(
        key=key,
        shape=tuple(weight.shape),
        source_dtype=str(weight.dtype).removeprefix("torch."),
        bytes_before=weight.nbytes,
        amax=quantized.amax,
        scale=float(quantized.scale),
        error=quantized.error,
    )


def report_on(weights, source="made_up.safetensors", kept=(), **recipe):
    """The report on quantizing weights (tensor key -> tensor). recipe: format, rounding, scaling, seed."""
    layers = tuple(quantized_layer(key, weight, **recipe) for key, weight in weights.items())
    return Report(source, "unknown", Recipe(**recipe), layers, tuple(kept))


def small_report(**recipe):
    """Four heavy-tailed layers of different kinds, and a kept tensor."""
    names = ("attn.qkv", "mlp.fc1", "adaLN_modulation.1", "linear")
    weights = {f"blocks.{i}.{name}.weight": heavy_tailed(i, 64, 32) for i, name in enumerate(names)}
    kept = (KeptTensor("norm.weight", (32,), "bfloat16", 64, Reason(NOT_LINEAR)),)
    return report_on(weights, kept=kept, **recipe)


def repeated(report, n):
    """A report of n layers: the given report's, over and over under new names."""
    layers = (report.layers[i % len(report.layers)] for i in range(n))
    return replace(report, layers=tuple(replace(layer, key=f"deep.{i}.{layer.key}") for i, layer in enumerate(layers)))


def landscapes(**recipe):
    """The report on the demo model with every Linear layer quantized, and these weights."""
    tensors = load_file(LANDSCAPES)
    linear = {key: value for key, value in tensors.items() if value.ndim == 2 and key.endswith(".weight")}
    kept = [
        KeptTensor(key, tuple(value.shape), str(value.dtype).removeprefix("torch."), value.nbytes, Reason(NOT_LINEAR))
        for key, value in tensors.items()
        if key not in linear
    ]
    return replace(report_on(linear, LANDSCAPES.name, kept, **recipe), family="sd3"), linear
