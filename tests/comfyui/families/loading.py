"""What ComfyUI really holds after loading a file: values, codes and settings. Runs inside ComfyUI's process.

Scaled FP8 is multiplied out here, by code that neither ComfyUI nor the pack shares.
"""

import torch

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def held(network):
    """Name in the module -> (tensor, scale) of everything that a network holds. scale: None where there is none."""
    tensors = dict(network.named_parameters(remove_duplicate=False))
    tensors |= dict(network.named_buffers(remove_duplicate=False))
    modules = dict(network.named_modules(remove_duplicate=False))
    found = {}
    for name, tensor in tensors.items():
        module = modules[name.rpartition(".")[0]]
        if hasattr(tensor, "_params"):
            found[name] = tensor._qdata, tensor._params.scale
        elif hasattr(tensor, "_layout_params"):
            found[name] = tensor._qdata, tensor._layout_params["scale"]
        elif tensor.dtype in FLOAT8 and name.endswith("weight"):
            found[name] = tensor.detach(), getattr(module, "scale_weight", None)
        else:
            found[name] = tensor.detach(), None
    return found


def values(network):
    """Every tensor in fp32 as the network means it."""
    return {
        name: tensor.float() if scale is None else tensor.float() * scale.float()
        for name, (tensor, scale) in held(network).items()
    }


def codes(network):
    """Name in the module -> (dtype, codes as bytes, scale) of the layers in scaled FP8."""
    return {
        name: (tensor.dtype, tensor.view(torch.uint8), float(scale))
        for name, (tensor, scale) in held(network).items()
        if scale is not None
    }


def different(network, expected, smallest=0.0):
    """Names of tensors with other values than those of the network `expected`, up to the smallest step."""
    got, wanted = values(network), values(expected)
    return [name for name, value in wanted.items() if not _equal(got.get(name), value, smallest)]


def only_cast(network, expected, float8, smallest=0.0):
    """Whether what differs is what a cast to FP8 without a scale makes of it, as ComfyUI 0.3.75 does."""
    got, wanted = values(network), values(expected)
    return all(
        torch.equal(got[name], wanted[name].to(float8).float()) for name in different(network, expected, smallest)
    )


def _equal(one, two, smallest):
    if one is None or one.shape != two.shape:
        return False
    return torch.equal(one, two) or torch.allclose(one, two, 0, smallest, equal_nan=True)


def close(one, two, tolerance):
    """Whether the results of two forward passes are equal up to a share of the largest value."""
    if one.shape != two.shape or not torch.isfinite(one).all():
        return False
    return float((one - two).abs().max()) <= tolerance * float(two.abs().max())


def as_one(result):
    """The result of a network, one tensor or several, as one in fp32."""
    parts = result if isinstance(result, (list, tuple)) else [result]
    return torch.cat([part.flatten().float() for part in parts if torch.is_tensor(part)])
