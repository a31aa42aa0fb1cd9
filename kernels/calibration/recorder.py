"""Records a calibration: running sums over the inputs of layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType

import torch

from ..errors import ActivationError
from ..numerics.scaling import tensor_to_amax
from .moments import LARGEST_INPUT, Calibration, LayerCalibration, Store, few_rows, moment_size
from .sums import FerriedSums, Ferry, Pin, Sums, not_pinned

GOLDEN_SECTION = (5**0.5 - 1) / 2
"""The fractional parts of its multiples are evenly spread over 0..1, for any number of them."""

KEPT_SHARE = 4
"""The rows themselves are kept while they take at most this fraction of the memory of their sums."""


class ActivationRecorder:
    """Records a calibration from the inputs of layers, call by call.

    Layers that see few rows keep them; the others keep sums. A context manager: at its end, memory that is still pinned
    is given back.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        most_rows: int | None = None,
        *,
        room: Callable[[torch.device], int] = lambda device: 0,
        pin: Pin = not_pinned,
        store: Store | None = None,
    ):
        """device: where the sums are kept. most_rows: rows recorded per call, evenly spaced; None: all. The next call
        records other positions.

        room: called once per GPU on which inputs are, it gives the bytes of sums that may stay there. pin: pins a
        tensor in main memory, so that sums that do not fit on the GPU travel there and back while it computes.

        store: memory for the sums of the result. Sums that need not be on a GPU or pinned lie there from the start, the
        others move there in `result`, one layer after the other; None: they stay where they are.
        """
        self.device, self.most_rows = torch.device(device), most_rows
        self._room, self._pin, self._store = room, pin, store
        self._left: dict[torch.device, int] = {}
        self._ferries: dict[torch.device, Ferry] = {}
        self._layers: dict[str, _Recorded] = {}

    def observe(self, key: str, x: torch.Tensor) -> None:
        """Add one call's inputs: x (..., width), float of any width, on any device.

        Raises ActivationError for NaN or infinite values, and for values above LARGEST_INPUT; on a GPU, which is not
        waited for here, when the first layer is observed again, or in `result`.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return
        amax = tensor_to_amax(rows)
        if not rows.is_cuda:
            _check(key, float(amax), rows)
        elif key == next(iter(self._layers), None):
            self._check_all()
        if key not in self._layers:
            self._layers[key] = _Recorded(rows.shape[1])
        layer = self._layers[key]
        layer.amax = amax if layer.amax is None else torch.maximum(layer.amax, amax.to(layer.amax.device))
        x = _thin(rows, self.most_rows or len(rows), layer.calls)
        layer.rows += len(x)
        layer.calls += 1
        if layer.sums is None and layer.keeps(x):
            layer.kept.append(x.to(self._place(x.device, x.nbytes), copy=True))
            return
        if layer.sums is None:
            layer.sums = self._new_sums(layer.width, x.device)
            for earlier in layer.kept:
                layer.sums.add(earlier.to(x.device))
            layer.kept.clear()
        layer.sums.add(x)

    def result(self, source: str = "") -> Calibration:
        """The recorded calibration, which the recorder then no longer holds.

        Raises ActivationError; see observe.
        """
        self._check_all()
        for ferry in self._ferries.values():
            ferry.finish()
        layers = {}
        while self._layers:
            key = next(iter(self._layers))
            layers[key] = self._layers.pop(key).result()
        return Calibration(layers, source)

    def __enter__(self) -> ActivationRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for ferry in self._ferries.values():
            ferry.finish()
        for layer in self._layers.values():
            if layer.sums:
                layer.sums.close()
        self._layers.clear()

    def _check_all(self) -> None:
        """In the order of the calls: the first layer with a bad input is the one to name."""
        amaxes = [(key, layer.amax) for key, layer in self._layers.items() if layer.amax is not None]
        if amaxes:
            values = torch.stack([amax.to(amaxes[0][1].device) for _, amax in amaxes]).tolist()
            for (key, _), value in zip(amaxes, values, strict=True):
                _check(key, value)

    def _place(self, device: torch.device, size: int) -> torch.device:
        """The GPU of the inputs if it has room left for `size` bytes, else the recorder's device."""
        if device.type != "cuda" or device == self.device:
            return self.device
        if device not in self._left:
            self._left[device] = self._room(device)
        if size > self._left[device]:
            return self.device
        self._left[device] -= size
        return device

    def _new_sums(self, width: int, device: torch.device) -> Sums | FerriedSums:
        """device: that of the inputs."""
        where = self._place(device, 4 * moment_size(width))
        if where != self.device:
            try:
                return Sums(width, where, self._store)
            except torch.cuda.OutOfMemoryError:
                self._left[device] = 0
        if device.type == "cuda" and self.device.type == "cpu":
            if device not in self._ferries:
                self._ferries[device] = Ferry(device)
            return FerriedSums(width, self._ferries[device], self._pin, self._store)
        return Sums(width, self.device, self._store)


def _check(key: str, amax: float, rows: torch.Tensor | None = None) -> None:
    """Raises ActivationError if the inputs of a layer cannot be used. rows: what to count them in."""
    layer = f"the inputs of layer '{key.removesuffix('.weight')}'"
    way_out = "the model does not work with these settings or in this precision; change them, then calibrate again"
    if not math.isfinite(amax):
        what = "NaN or infinite"
        if rows is not None:
            what = f"{int(rows.isnan().sum())} NaN and {int(rows.float().isinf().sum())} infinite"
        raise ActivationError(f"{layer} hold {what} values: {way_out}")
    if amax > LARGEST_INPUT:
        raise ActivationError(f"{layer} reach {amax:.3g}, more than {LARGEST_INPUT:.0e}: {way_out}")


def _thin(rows: torch.Tensor, most: int, call: int) -> torch.Tensor:
    """At most `most` of the rows, evenly spaced. The first one moves from call to call: fixed positions could be the
    same few columns of an image each time."""
    step = -(-len(rows) // most)
    return rows[int(step * (call * GOLDEN_SECTION % 1)) :: step]


class _Recorded:
    """What is known of one layer."""

    def __init__(self, width: int):
        self.width, self.rows, self.calls = width, 0, 0
        self.amax: torch.Tensor | None = None
        self.kept: list[torch.Tensor] = []
        """The rows, in calls, unless there are `sums`."""
        self.sums: Sums | FerriedSums | None = None

    def keeps(self, x: torch.Tensor) -> bool:
        """Whether these rows can be kept as they are."""
        return KEPT_SHARE * (sum(rows.nbytes for rows in self.kept) + x.nbytes) <= 4 * moment_size(self.width)

    def result(self) -> LayerCalibration:
        amax = 0.0 if self.amax is None else float(self.amax)
        if self.sums is None:
            return few_rows(torch.cat([rows.cpu() for rows in self.kept]), amax)
        packed = self.sums.stored()
        return LayerCalibration(self.width, self.rows, amax, lambda: packed)
