"""Settings of a run, in frozen sections, checked on construction; the error names the flag.

Each station takes its own section. Those fields that change results are part of the run key (`results_key`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

from hover_batch.errors import InputError

SobelNorm = Literal["fixed", "window"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
Runtime = Literal["auto", "torch", "compile", "openvino"]
Backend = Literal["ray", "local"]


MAX_WORKERS = 1_000_000
"""Of cores and GPUs: a number above is a slip of the finger."""
MAX_SIDE = 16_384
"""Of what is held in memory at once, in inference pixels: all planes of such a square are a few GB."""


def _check(ok: bool, flag: str, value: object, rule: str) -> None:
    if not ok:
        raise InputError(f"--{flag} {value}: {rule}")


def _typed(name: str, value: object, kind: type) -> Any:
    """`value` as a file gives it, of the type of the setting `name`; a float may be written as a whole number."""
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    words = {
        dict: "a section",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text in quotes",
    }
    raise InputError(f"setting {name} = {value!r}: must be {words[kind]}")


@dataclass(frozen=True, kw_only=True)
class TissueSettings:
    """Where to look for nuclei."""

    tissue: Literal["auto", "all"] = "auto"
    """auto: a mask from a thumbnail; all: the whole canvas. A mask from the cohort CSV goes before both."""
    mask_mpp: float = 8.0
    """Pixel size of the mask in µm: fine enough for a gland's edge, small enough for any slide."""
    min_tissue_um2: float = 2_500.0
    """Pieces and holes below this area are dropped and filled (50 × 50 µm: a few dozen nuclei)."""

    def __post_init__(self) -> None:
        _check(self.tissue in ("auto", "all"), "tissue", self.tissue, "auto or all")
        _check(1 <= self.mask_mpp <= 64, "mask-mpp", self.mask_mpp, "between 1 and 64 µm")
        _check(0 <= self.min_tissue_um2 < float("inf"), "min-tissue-um2", self.min_tissue_um2, "0 or more")


@dataclass(frozen=True, kw_only=True)
class InferSettings:
    """How tiles go through the network."""

    unit: int = 4096
    """Side of a unit in inference pixels: what is read, predicted and stored at once, one shard."""
    batch: int = 8
    """Tiles a batch; batches never mix units and the last is padded, so the shape is constant."""
    precision: Precision = "auto"
    """auto: fp16 on a GPU that is made for it, else fp32; both find the same nuclei. bf16, of fewer digits, moves
    outlines."""
    runtime: Runtime = "auto"
    """auto: openvino on a processor, where it is installed and the precision is fp32; else torch. compile: torch after
    torch.compile. Each rounds otherwise, and finds the same nuclei."""
    threads: int = 0
    """Threads of one copy of the network on the CPU; 0 = as the machine suggests. They change no result."""
    device: str = "auto"
    """auto: cuda where there is one; or a torch device name."""

    def __post_init__(self) -> None:
        fits = 256 <= self.unit <= MAX_SIDE and self.unit % 256 == 0
        _check(fits, "unit", self.unit, f"a multiple of 256 up to {MAX_SIDE}")
        _check(1 <= self.batch <= 1024, "batch", self.batch, "between 1 and 1024")
        _check(self.precision in get_args(Precision), "precision", self.precision, "auto, fp32, fp16 or bf16")
        _check(self.runtime in get_args(Runtime), "runtime", self.runtime, "auto, torch, compile or openvino")
        _check(0 <= self.threads <= 1024, "threads", self.threads, "between 0 and 1024")


@dataclass(frozen=True, kw_only=True)
class PostSettings:
    """How maps become nuclei (the numbers of HoVerNet's reference post-processing are the defaults)."""

    sobel_norm: SobelNorm = "fixed"
    """fixed: the model card's constants, the same nuclei wherever seams fall; window: as the reference does."""
    halo: int = 64
    """Inference pixels that a region is read wider on each side; larger components are redone by themselves."""
    min_area_px: int = 64
    """Inference pixels below which an instance is taken for debris: 4 µm² at 0.25 µm, a nucleus 2.3 µm across. The
    reference keeps all from 10 pixels on; this gave a better PQ on every validation source of the starter."""
    max_component: int = 4096
    """Side in inference pixels beyond which a connected component is not chased further but flagged."""
    class_map: dict[str, Any] = field(default_factory=dict)
    """New class → classes of the model that it stands for (see `Taxonomy.merged`); empty: the model's own."""

    def __post_init__(self) -> None:
        _check(self.sobel_norm in ("fixed", "window"), "sobel-norm", self.sobel_norm, "fixed or window")
        _check(0 <= self.halo <= 4096, "halo", self.halo, "between 0 and 4096")
        _check(0 <= self.min_area_px <= 10_000, "min-area-px", self.min_area_px, "between 0 and 10000")
        fits = 256 <= self.max_component <= MAX_SIDE
        _check(fits, "max-component", self.max_component, f"between 256 and {MAX_SIDE}")


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is left on disk beside the tables."""

    discard_predictions: bool = False
    """Remove a slide's prediction store once its table is written."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Where the work is done. Nothing here changes results."""

    backend: Backend = "ray"
    """ray: processes on all cores and GPUs of this machine or of a cluster; local: all in this process, for debuggers
    and as the reference."""
    cpus: int = 0
    """Cores to use; 0 = all that this machine, or the cluster, has."""
    gpus: int = -1
    """GPUs to use; -1 = all that there are."""
    address: str = ""
    """Of a Ray cluster to join; empty: start one on this machine for the time of the run."""
    scratch: str = ""
    """Folder on each machine for copies of slides that lie in other storage; empty: the one for temporary files."""
    max_failures: int = -1
    """Stop when more slides than this have failed; -1 = never."""

    def __post_init__(self) -> None:
        _check(self.backend in ("ray", "local"), "backend", self.backend, "ray or local")
        _check(0 <= self.cpus <= MAX_WORKERS, "cpus", self.cpus, "0 (all) or a number of cores")
        _check(-1 <= self.gpus <= MAX_WORKERS, "gpus", self.gpus, "a number of GPUs, or -1 for all")
        _check(self.max_failures >= -1, "max-failures", self.max_failures, "a number of slides, or -1 for never")
        if self.address and self.backend == "local":
            raise InputError(f"--address {self.address}: only --backend ray joins a cluster")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of a run."""

    model: str = "starter"
    """A package: a name, a .safetensors file or a folder."""
    tissue: TissueSettings = field(default_factory=TissueSettings)
    infer: InferSettings = field(default_factory=InferSettings)
    post: PostSettings = field(default_factory=PostSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as settings.toml holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; missing keys take their defaults, unknown ones are refused by name."""
        sections = {
            "tissue": TissueSettings,
            "infer": InferSettings,
            "post": PostSettings,
            "output": OutputSettings,
            "engine": EngineSettings,
        }
        known: dict[str, Any] = {}
        for key, value in data.items():
            if key == "model":
                known[key] = _typed(key, value, str)
            elif key in sections:
                if not isinstance(value, Mapping):
                    raise InputError(
                        f"setting {key} = {value!r}: {key} is a section, write [{key}] and its settings below"
                    )
                defaults = vars(sections[key]())
                names = set(defaults)
                unknown = sorted(set(value) - names)
                if unknown:
                    raise InputError(
                        f"setting {key}.{unknown[0]} is not known; [{key}] knows {', '.join(sorted(names))}"
                    )
                typed = {name: _typed(f"{key}.{name}", v, type(defaults[name])) for name, v in value.items()}
                known[key] = sections[key](**typed)
            else:
                raise InputError(f"setting {key} is not known; known are model, {', '.join(sections)}")
        return cls(**known)

    def results_key(self) -> dict[str, Any]:
        """The settings that change results, for the run key (the model enters it by the hash of its weights)."""
        infer = asdict(self.infer)
        infer["device"] = self.infer.device.split(":")[0]  # one GPU of a node is as good as the next
        del infer["threads"]  # shown by tests/test_precision.py: the maps are the same, bit for bit
        post = asdict(self.post)
        if not self.post.class_map:
            del post["class_map"]
        return {"tissue": asdict(self.tissue), "infer": infer, "post": post}
