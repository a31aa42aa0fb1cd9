"""Lets a CUDA build of torchvision import next to a CPU build of torch.

Installed into site-packages with a ``.pth`` file that imports it at start-up. torchvision registers shape functions
for two operators that its compiled library, unloadable without CUDA, would have defined; so they are defined here,
just before torchvision's first import. torch itself is not imported before that.
"""

import sys

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries = []


def define_missing_operators():
    """Declare ``torchvision::nms`` and ``qnms``; a torch built for CUDA gets them from torchvision itself."""
    import torch

    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _libraries.append(library)  # the definitions live as long as this object


class _BeforeTorchvision:
    """An import hook that runs once and leaves the import to the ordinary finders."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            define_missing_operators()


sys.meta_path.insert(0, _BeforeTorchvision)
