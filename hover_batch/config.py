"""Settings of a run, in frozen sections that are checked when they are made; errors name the option, or the setting.

Each step takes its own section. The fields that change results are part of the run key (`results_key`).
A setting is declared here and, unless only a file or the environment sets it, as an option of a command: its choices,
default, section and type are read from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from hover_batch.errors import InputError

Tissue = Literal["auto", "all"]
SobelNorm = Literal["fixed", "window"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
Runtime = Literal["auto", "torch", "compile", "openvino"]
Backend = Literal["ray", "local"]
BackendChoice = Literal["auto", "ray", "local"]


AUTO_BATCH = -1
"""Value of `batch` for the word auto."""
MAX_WORKERS = 1_000_000
"""Limit of cores and GPUs; larger values are treated as typos."""
MAX_SIDE = 16_384
"""Limit in inference pixels of the side of what is held in memory at once; all planes of such a square are a few GB."""
_BATCH_RULE = "auto, or between 1 and 1024"


def _check(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise InputError(f"{name} {value}: {rule}")


def _typed(name: str, value: object, kind: type) -> Any:
    """Return `value`, as a file gives it, in the type of the setting `name`; a float may be written without a point."""
    if name == "infer.batch" and isinstance(value, str | int) and value in ("auto", AUTO_BATCH):
        _check(value == "auto", "--batch", value, _BATCH_RULE)
        return AUTO_BATCH
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise InputError(f"setting {name}: a number of {len(str(value))} digits is too large") from None
    words = {
        dict: "a section",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text in quotes",
    }
    raise InputError(f"setting {name} = {value!r}: must be {words[kind]}")


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base class of the sections. InputError if a field of a Literal type has another value."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                *others, last = get_args(kind)
                value = getattr(self, name)
                _check(value in (*others, last), f"--{name.replace('_', '-')}", value, f"{', '.join(others)} or {last}")


@dataclass(frozen=True, kw_only=True)
class TissueSettings(Section):
    """Settings of the tissue mask."""

    tissue: Tissue = "auto"
    """auto: a mask from a thumbnail; all: the whole canvas. A mask from the cohort CSV takes precedence."""
    mask_mpp: float = 8.0
    """Pixel size of the mask in µm: fine enough for a gland's edge, small enough for any slide."""
    min_tissue_um2: float = 2_500.0
    """Area in µm² below which pieces are dropped and holes filled (50 × 50 µm: a few dozen nuclei)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(1 <= self.mask_mpp <= 64, "--mask-mpp", self.mask_mpp, "between 1 and 64 µm")
        _check(0 <= self.min_tissue_um2 < float("inf"), "--min-tissue-um2", self.min_tissue_um2, "0 or more")


@dataclass(frozen=True, kw_only=True)
class InferSettings(Section):
    """Settings of inference."""

    unit: int = 4096
    """Side in inference pixels of a unit, which is read, predicted and stored at once, as one shard."""
    batch: int = 8
    """Tiles in a batch; batches never mix units, and the last is padded, so that the shape is constant.

    auto (AUTO_BATCH): on a GPU a power of two, found in a short trial; on a CPU the default. The number is recorded."""
    precision: Precision = "auto"
    """auto: fp16 on a GPU with hardware for it, else fp32; both find the same nuclei. bf16 has fewer digits and shifts
    outlines."""
    runtime: Runtime = "auto"
    """auto: openvino on a CPU, if it is installed and the precision is fp32; else torch. compile: torch after
    torch.compile. They round differently and find the same nuclei."""
    threads: int = 0
    """Threads of one copy of the network on the CPU; 0 = chosen for the machine. They do not change results, except for
    single bytes with the runtime compile on some processors."""
    device: str = "auto"
    """auto: cuda if available, else cpu; or a torch device name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = 256 <= self.unit <= MAX_SIDE and self.unit % 256 == 0
        _check(fits, "--unit", self.unit, f"a multiple of 256 up to {MAX_SIDE}")
        fits = self.batch == AUTO_BATCH or 1 <= self.batch <= 1024
        _check(fits, "--batch", self.batch, _BATCH_RULE)
        _check(0 <= self.threads <= 1024, "--threads", self.threads, "between 0 and 1024")


@dataclass(frozen=True, kw_only=True)
class PostSettings(Section):
    """Settings of post-processing. The defaults are those of HoVerNet's reference, except where noted."""

    sobel_norm: SobelNorm = "fixed"
    """fixed: the model card's constants, the same nuclei wherever seams fall; window: as in the reference."""
    halo: int = 64
    """Context in inference pixels read around each region; larger components are processed on their own."""
    min_area_px: int = 64
    """Area in inference pixels below which an instance is treated as debris: 4 µm² at 0.25 µm, a nucleus 2.3 µm across.
    The reference has 10 pixels; this gave a better PQ on every validation source of the starter."""
    max_component: int = 4096
    """Side in inference pixels above which a connected component is flagged instead of being processed whole."""
    class_map: dict[str, Any] = field(default_factory=dict)
    """The model's classes that a new class replaces, by its name (see `Taxonomy.merged`); empty: the model's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(0 <= self.halo <= 4096, "--halo", self.halo, "between 0 and 4096")
        _check(0 <= self.min_area_px <= 10_000, "--min-area-px", self.min_area_px, "between 0 and 10000")
        fits = 256 <= self.max_component <= MAX_SIDE
        _check(fits, "post.max_component", self.max_component, f"between 256 and {MAX_SIDE}")


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Section):
    """Settings of an estimate from a part of each slide. They do not change the results of a whole slide."""

    stop_at: float = 0.0
    """Stop a slide when the interval of its density lies within ± this share of it, such as 0.05; 0 = process whole
    slides."""
    of: str = "nuclei"
    """Density to which `stop_at` applies: `nuclei` for all nuclei, or the name of a class."""
    cluster: int = 1024
    """Side in inference pixels of the squares that are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            0 <= self.stop_at < 1, "--stop-at", self.stop_at, "a share below 1, such as 5% or 0.05; 0 = whole slides"
        )
        _check(64 <= self.cluster <= MAX_SIDE, "sample.cluster", self.cluster, f"between 64 and {MAX_SIDE}")


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Section):
    """Settings of the files in the output folder."""

    discard_predictions: bool = False
    """Remove a slide's prediction store once its table is written."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Section):
    """Settings of execution, which do not change results."""

    backend: BackendChoice = "auto"
    """ray: processes on all cores and GPUs of this machine or a cluster. local: all work in this process. auto: local
    for runs with few tiles on this machine, which end before Ray has started."""
    cpus: int = 0
    """Cores to use; 0 = all of this machine or cluster."""
    gpus: int = -1
    """GPUs to use; -1 = all."""
    address: str = ""
    """Ray cluster to join; empty: start Ray on this machine for the run."""
    scratch: str = ""
    """Folder on each machine for copies of slides from cloud storage; empty: the folder for temporary files."""
    max_failures: int = -1
    """Stop when more slides than this have failed; -1 = never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(0 <= self.cpus <= MAX_WORKERS, "--cpus", self.cpus, "0 (all) or a number of cores")
        _check(-1 <= self.gpus <= MAX_WORKERS, "--gpus", self.gpus, "a number of GPUs, or -1 for all")
        _check(self.max_failures >= -1, "--max-failures", self.max_failures, "a number of slides, or -1 for never")
        if self.address and self.backend == "local":
            raise InputError(f"--address {self.address}: only --backend ray joins a cluster")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run."""

    model: str = "starter"
    """A package: a name, a .safetensors file or a folder."""
    tissue: TissueSettings = field(default_factory=TissueSettings)
    """Settings of the tissue mask."""
    infer: InferSettings = field(default_factory=InferSettings)
    """Settings of inference."""
    post: PostSettings = field(default_factory=PostSettings)
    """Settings of post-processing."""
    sample: SampleSettings = field(default_factory=SampleSettings)
    """Settings of an estimate from a part of each slide."""
    output: OutputSettings = field(default_factory=OutputSettings)
    """Settings of the output folder."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """Settings of execution."""

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as the plain values that settings.toml contains.

        The keys are `model` and the names of the sections; each section is a dictionary of values by name.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build the settings from nested values, as `to_dict` returns them, with defaults for missing ones.

        A whole number may be given for a float, and "auto" for `infer.batch`.

        InputError for unknown names, wrong types and invalid values.
        """
        sections = {name: section for name, section in vars(cls()).items() if isinstance(section, Section)}
        checked: dict[str, Any] = {}
        for key, value in data.items():
            if key == "model":
                checked[key] = _typed(key, value, str)
            elif key not in sections:
                raise InputError(f"setting {key} is not known; known are model, {', '.join(sections)}")
            elif not isinstance(value, Mapping):
                raise InputError(f"setting {key} = {value!r}: {key} is a section, write [{key}] and its settings below")
            else:
                defaults = vars(sections[key])
                if unknown := sorted(value.keys() - defaults.keys()):
                    names = ", ".join(sorted(defaults))
                    raise InputError(f"setting {key}.{unknown[0]} is not known; known in [{key}] are {names}")
                typed = {name: _typed(f"{key}.{name}", v, type(defaults[name])) for name, v in value.items()}
                checked[key] = type(sections[key])(**typed)
        return cls(**checked)

    def results_key(self) -> dict[str, Any]:
        """Return the settings that change results, for the run key.

        The keys are `tissue`, `infer` and `post`; each section is a dictionary of values by name. The model is not
        included, since its hash is another part of the run key. `threads` and an empty class map are left out, too. A
        device is named without its number.

        A new field of these sections changes the run key, so that runs of earlier versions cannot be resumed, unless it
        is left out here at its default.
        """
        infer = asdict(self.infer)
        infer["device"] = self.infer.device.split(":")[0]  # all GPUs of a node give the same results
        del infer["threads"]  # tests/test_precision.py: the maps are the same, bit for bit
        post = asdict(self.post)
        if not self.post.class_map:
            del post["class_map"]
        return {"tissue": asdict(self.tissue), "infer": infer, "post": post}


SECTION_OF = {
    name: section for section, value in Settings().to_dict().items() if isinstance(value, dict) for name in value
}
"""Section of each setting but the model; no two sections share a name."""


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings grouped by section, for `Settings.from_dict`.

    `settings`: values by the names of the settings, without their section. `model` is not accepted, since it has no
    section.

    InputError for unknown names.
    """
    data: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in SECTION_OF:
            raise InputError(f"setting {name} is not known; known are {', '.join(sorted(SECTION_OF))}")
        data.setdefault(SECTION_OF[name], {})[name] = value
    return data
