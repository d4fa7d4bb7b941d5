"""Predict batches of tiles as cropped and quantised maps.

The batch shape is constant (short batches are padded), because the last bits of a network's output for one tile may
depend on the batch's shape, and equal settings must give equal bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import hed_from_rgb
from torch import Tensor, nn

from hover_batch.config import AUTO_BATCH, InferSettings, Precision, Runtime
from hover_batch.errors import InputError
from hover_batch.model.architectures import file_of
from hover_batch.model.card import Card
from hover_batch.model.heads import HV, NP, Heads, MapLayout
from hover_batch.model.in_flight import Computed, InFlight, Pending, Streams
from hover_batch.model.openvino import OpenVinoNetwork, cached_conversion, convert
from hover_batch.model.package import Package, load_network

STAIN_FROM_OD = torch.tensor(hed_from_rgb[:, :2], dtype=torch.float32)
"""Matrix (3, 2) from optical densities of RGB to hematoxylin and eosin (Ruifrok and Johnston 2001, as in skimage)."""


_SHORT = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Predictor:
    """Network on its device, ready to predict batches of tiles.

    `network`: result of `load_network`, or an OpenVinoNetwork. `card`: card of its package. `settings`: may contain
    `auto`. Call it from one thread at a time; threads that share it hold `turn`.

    Settings of this process are changed: on the CPU, torch's number of threads is set; on a GPU, cuDNN computes without
    TF32.

    InputError if the device or the runtime cannot be used; PackageError if the network cannot be compiled for it.
    """

    def __init__(self, network: nn.Module, card: Card, settings: InferSettings) -> None:
        self.card = card
        resolved = resolve(card.supported(settings))
        self.device = torch.device(resolved.device)
        self.precision = resolved.precision
        self.runtime = resolved.runtime
        self.turn = threading.Lock()
        """Lock that threads which share the predictor hold while they submit one batch."""
        self.streams: Streams | None = None
        """Streams of a GPU, in which batches are in flight; None if `submit` computes at once."""
        if self.device.type == "cuda":
            from hover_batch.model.cuda_streams import cuda_streams

            self.streams = cuda_streams(self.device)
            torch.backends.cudnn.allow_tf32 = False  # TF32 has no more digits than fp16
        if self.device.type == "cpu":
            torch.set_num_threads(settings.threads or torch.get_num_threads())
        self._threads: ThreadPoolExecutor | None = None
        if self.device.type == "cpu" and resolved.runtime == "torch":
            # An image per thread: the last bits of some convolutions depend on the number of threads that share one.
            self._threads = ThreadPoolExecutor(
                torch.get_num_threads(), "predict", initializer=torch.set_num_threads, initargs=(1,)
            )
        self.network = network
        if not isinstance(network, OpenVinoNetwork):
            from hover_batch.model.prepare import prepared

            self.network = prepared(network, card, self.device, resolved.runtime, resolved.precision)
            if resolved.runtime == "openvino":
                self.network = OpenVinoNetwork(convert(self.network, card.tile_in), resolved.batch, settings.threads)
        self.batch = self._auto_batch() if resolved.batch == AUTO_BATCH else resolved.batch
        """Largest number of tiles in a batch."""
        self.at_once = self.batch
        """Tiles per call of the network: `batch`, halved each time the device runs out of memory."""
        if resolved.runtime == "compile":
            from hover_batch.model.compiled import CompiledNetwork

            self.network = CompiledNetwork(self.network)
            self.predict(np.zeros((1, card.tile_in, card.tile_in, 3), np.uint8))  # compile it now

    def _auto_batch(self) -> int:
        """Return the batch size for this network on its GPU, found in a trial of a few seconds."""
        from hover_batch.model.auto_batch import cuda_trial, doubled

        def compute(tiles: Tensor) -> Tensor:
            self.at_once = len(tiles)
            return self._block(tiles)

        return doubled(cuda_trial(compute, self.card.tile_in, self.device))

    def submit(self, tiles: Sequence[NDArray[np.uint8]]) -> Pending:
        """Start the network on tiles. Return the batch, whose `result` gives the maps that `predict` would return.

        On a GPU, the call returns without waiting for the device, and `Pending.result` raises the errors of the device.
        Otherwise, this call computes the maps, and raises the errors of `predict`. Several threads may call this
        method; they take turns.

        `tiles`: RGB (tile_in, tile_in, 3) uint8 each, at most `batch` of them.
        """
        if self.streams is None:
            return self._in_turn(np.stack(tiles))
        held = self.streams.empty((len(tiles), *tiles[0].shape))
        np.stack(tiles, out=held.numpy())
        shape = len(tiles), self.card.layout.planes, self.card.tile_out, self.card.tile_out
        with self.turn:
            return InFlight(self.streams, held, shape, self._uploaded, self._block, self._in_turn)

    def _in_turn(self, tiles: NDArray[np.uint8]) -> Computed:
        with self.turn:
            return Computed(self.predict, tiles)

    @torch.inference_mode()
    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the maps (n, plane, tile_out, tile_out) uint8 of the kept pixels of tiles (see `MapLayout`).

        If fp16 overflows, the tiles are computed again in fp32. If the device runs out of memory, `at_once` is halved
        for this and all later calls.

        `tiles`: (n, tile_in, tile_in, 3) uint8 RGB, at most `batch` of them.

        torch.OutOfMemoryError if one tile does not fit in memory, PackageError if the network cannot be compiled.
        """
        return self._as_fits(tiles, lambda rgb: self._quantised(self._checked_output(rgb), rgb))

    @torch.inference_mode()
    def logits(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the network's output for the kept pixels of tiles (see `Heads`).

        It is (n, channel, tile_out, tile_out) float32. If fp16 overflows, the tiles are computed again in fp32. If the
        device runs out of memory, `at_once` is halved for this and all later calls.

        `tiles`: (n, tile_in, tile_in, 3) uint8 RGB, at most `batch` of them.

        torch.OutOfMemoryError if one tile does not fit in memory, PackageError if the network cannot be compiled.
        """
        return self._as_fits(tiles, self._checked_output)

    def _as_fits(self, tiles: NDArray[np.uint8], work: Callable[[Tensor], Tensor]) -> NDArray[Any]:
        """Apply `work` to `at_once` tiles at a time, halving `at_once` when the device runs out of memory."""
        while True:
            try:
                parts = torch.split(self._uploaded(torch.from_numpy(tiles)), self.at_once)
                return np.concatenate([work(_padded(part, self.at_once))[: len(part)].cpu().numpy() for part in parts])
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise
                self.at_once //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # outside the except block, whose traceback holds references to the memory

    @torch.inference_mode()
    def _block(self, tiles: Tensor) -> Tensor:
        """Return the maps of tiles on the device for `InFlight`: flat, and 0 last if fp16 overflowed.

        Checking `isfinite` here, as `_checked_output` does, would make the host wait for the device.
        """
        size = self.at_once
        maps, finite = [], []
        for part in torch.split(tiles, size):
            rgb = _padded(part, size)
            output = self._output(rgb)
            maps.append(self._quantised(output, rgb)[: len(part)].flatten())
            finite.append(output.isfinite().all() | (self.precision != "fp16"))
        return torch.cat([*maps, torch.stack(finite).all()[None].to(torch.uint8)])

    def _uploaded(self, tiles: Tensor) -> Tensor:
        """Return tiles (n, tile_in, tile_in, 3) uint8 as (n, 3, tile_in, tile_in) on the device."""
        return tiles.to(self.device, non_blocking=self.streams is not None).permute(0, 3, 1, 2)

    def _quantised(self, output: Tensor, rgb: Tensor) -> Tensor:
        return quantise(output, _centre(rgb, self.card.tile_out), self.card.layout)

    def _checked_output(self, rgb: Tensor) -> Tensor:
        """Return the output as `_output` does, in fp32 if an intermediate value exceeded 65504, the limit of fp16."""
        output = self._output(rgb)
        if self.precision == "fp16" and not output.isfinite().all():
            output = _centre(self.network(_scaled(rgb)), self.card.tile_out).float()
        return output

    def _output(self, rgb: Tensor) -> Tensor:
        """Return the output (n, channels, tile_out, tile_out) float32 for RGB (n, 3, tile_in, tile_in) uint8."""
        image = _scaled(rgb)
        if self._threads is None:
            return self._forward(image)
        return torch.cat(list(self._threads.map(self._forward, torch.split(image, 1))))

    @torch.inference_mode()
    def _forward(self, image: Tensor) -> Tensor:
        """Return the network's output (n, channels, tile_out, tile_out) for RGB (n, 3, tile_in, tile_in) in [0, 1]."""
        with self.autocast():
            return _centre(self.network(image), self.card.tile_out).float()

    def autocast(self) -> torch.autocast:
        """Return a context manager in which torch computes in the predictor's `precision`.

        It has an effect only if the precision is fp16 or bf16.
        """
        short = _SHORT.get(self.precision)
        return torch.autocast(self.device.type, short or torch.bfloat16, enabled=short is not None)


def load_predictor(package: Package, settings: InferSettings) -> Predictor:
    """Load a package's network onto its device, ready to predict.

    With OpenVINO, the converted network is cached. Settings of this process are changed: on the CPU, torch's number of
    threads is set; on a GPU, cuDNN computes without TF32.

    `package`: package on disk. `settings`: settings of inference, which may contain `auto`.

    InputError if the device or the runtime cannot be used, PackageError if the weights cannot be loaded or the network
    cannot be compiled.
    """
    card, resolved = package.card, resolve(package.card.supported(settings))
    if resolved.runtime != "openvino":
        return Predictor(load_network(package), card, settings)

    def load() -> nn.Module:
        from hover_batch.model.prepare import prepared

        return prepared(load_network(package), card, torch.device("cpu"), "openvino", "fp32")

    model = cached_conversion(package.sha256, card.tile_in, file_of(card.architecture), load)
    return Predictor(OpenVinoNetwork(model, resolved.batch, settings.threads), card, settings)


def auto_batch(package: Package, settings: InferSettings) -> int:
    """Return the batch size that inference with `settings` uses for `package` on this machine.

    The network is loaded, and released afterwards. With `--batch auto` on a GPU, the size is found in a trial of a few
    seconds; otherwise it is the size that `resolve` returns. On the CPU, torch's number of threads in this process is
    set; on a GPU, cuDNN computes without TF32 from then on.

    InputError if the device or the runtime cannot be used, PackageError if the network cannot be loaded or compiled.
    """
    batch = load_predictor(package, settings).batch
    torch.cuda.empty_cache()  # for the processes that will use the GPU
    return batch


def _padded(tiles: Tensor, size: int) -> Tensor:
    """Return `size` tiles (size, 3, y, x), the missing ones black."""
    missing = size - len(tiles)
    return torch.cat([tiles, tiles.new_zeros((missing, *tiles.shape[1:]))]) if missing else tiles


def _scaled(rgb: Tensor) -> Tensor:
    """Return RGB (n, 3, y, x) uint8 as float32 in [0, 1], the channels last in memory."""
    return rgb.float().div(255).contiguous(memory_format=torch.channels_last)


def _centre(planes: Tensor, side: int) -> Tensor:
    """Return the central `side` × `side` pixels of planes (b, c, y, x) of any size."""
    margin = (planes.shape[-1] - side) // 2
    return planes[:, :, margin : margin + side, margin : margin + side]


def quantise(output: Tensor, rgb: Tensor, layout: MapLayout) -> Tensor:
    """Return the maps (b, plane, y, x) uint8 that are stored for a network's output (see `MapLayout`).

    `output`: (b, channel, y, x) float32 (see `Heads`). `rgb`: (b, 3, y, x) uint8, the same pixels. `layout`: layout of
    the maps, with the number of classes of the output.
    """
    nucleus = (output[:, NP].softmax(1)[:, 1:] * 256).floor().clamp(max=255)
    near = nucleus >= layout.NP_NEAR
    hv = (output[:, HV].clamp(-1, 1) * 127).round().to(torch.int8).view(torch.uint8)
    types = (output[:, Heads(layout.n_types).tp].softmax(1) * 255).round() * near
    stains = (stain_density(rgb) * layout.OD_SCALE).round().clamp(max=255) * near
    return torch.cat([nucleus.to(torch.uint8), hv, types.to(torch.uint8), stains.to(torch.uint8)], dim=1)


def stain_density(rgb: Tensor) -> Tensor:
    """Return the optical densities of hematoxylin and eosin (b, 2, y, x) float32, at least 0.

    An intensity I of a colour has the density -log10((I + 1) / 256). The product with the stain matrix is written out,
    so that results do not depend on the batch's shape.

    `rgb`: (b, 3, y, x) uint8.
    """
    red, green, blue = (-torch.log10((rgb.float() + 1) / 256)).unbind(1)
    matrix = STAIN_FROM_OD.to(rgb.device)
    stains = [red * matrix[0, i] + green * matrix[1, i] + blue * matrix[2, i] for i in range(2)]
    return torch.stack(stains, 1).clamp(min=0)


def resolve(settings: InferSettings) -> InferSettings:
    """Return the settings with `auto` replaced by the device, precision and runtime for this machine.

    A run records the result. On the CPU, the batch size AUTO_BATCH is replaced by `InferSettings.batch`. On a GPU,
    AUTO_BATCH remains, because the batch size depends on the network (see `auto_batch`).

    InputError if the device is not available, or if the runtime openvino is combined with a device other than the CPU
    or with the precision fp16 or bf16.
    """
    if settings.runtime == "openvino":
        device = _device("cpu" if settings.device == "auto" else settings.device)
        if device.type != "cpu" or settings.precision in _SHORT:
            raise InputError("--runtime openvino: runs on the CPU in fp32; omit --device and --precision")
        return replace(settings, device="cpu", precision="fp32", batch=_cpu_batch(settings))
    device = _device(settings.device)
    precision = _precision(settings.precision, device)
    runtime: Runtime = settings.runtime
    if runtime == "auto":
        fits = device.type == "cpu" and precision == "fp32" and find_spec("openvino") is not None
        runtime = "openvino" if fits else "torch"
    batch = settings.batch if device.type == "cuda" else _cpu_batch(settings)
    return replace(settings, device=str(device), precision=precision, runtime=runtime, batch=batch)


def _cpu_batch(settings: InferSettings) -> int:
    return InferSettings.batch if settings.batch == AUTO_BATCH else settings.batch


def _precision(wanted: Precision, device: torch.device) -> Precision:
    """Resolve `auto`: fp16 on GPUs with tensor cores (Volta and later), else fp32."""
    if wanted != "auto":
        return wanted
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(
            f"--device {name}: cannot be used on this machine ({reason}); use auto, cpu or cuda"
        ) from error
    if device.type == "meta":
        raise InputError(f"--device {name}: has no data to compute with; use auto, cpu or cuda")
    return device
