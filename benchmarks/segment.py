"""Speed of `segment` and of tiatoolbox's engine on the same tissue, with the same student and with HoVerNet-fast.

    python -m benchmarks.segment [--json FILE] [--repeats N] [--teacher-repeats N]
    python -m benchmarks.segment --budget [--json FILE] [--repeats N]

The programs run in turn, each in its own process; medians are reported. `work` is the time from the first pixel read to
the finished table; `process` is the time of the whole command, with imports and loading of weights. tiatoolbox's engine
has favourable settings: our batch size, one worker per core, and QuPath JSON as output. HoVerNet has random weights,
and dark pixels stand in for its output, so that its post-processing has nuclei to work on. The compilation by OpenVINO
is part of `process`, but not of `work`. The benchmark only reports times; it does not check them.

`--budget` reports the CPU seconds of each stage per mm² of predicted tiles, for the whole TCGA slide. If a GPU runs the
network, the other stages limit the speed. The same slide is processed several times in one process. The first time is
reported separately, since it includes what a process does only once, such as loading compiled functions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.maps import DENSE_FIELD, SLIDE
from hover_batch import pipeline
from hover_batch.blocks import ReadBlocks
from hover_batch.cli import app
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import SlideRecord, Stage
from hover_batch.config import InferSettings
from hover_batch.executor import local
from hover_batch.geometry import Box, Grid
from hover_batch.model.in_flight import Computed
from hover_batch.model.package import find_package
from hover_batch.seconds import Seconds
from hover_batch.slide.example import write_pyramidal_tiff
from hover_batch.slide.reader import SlideReader, open_slide
from hover_batch.slide_work import SlideWork

REGION = "region.tif"
"""Name of the slide with the densest field."""
MPP = 0.25
"""Pixel size of that slide, in µm."""
BATCH = 8
"""Tiles that are predicted at once."""
DARK = 130
"""Mean of red, green and blue below which pixels are nuclei for the HoVerNet with random weights."""
LOCAL, RAY, TORCH = "segment, local", "segment, ray", "segment, local, torch"
"""Programs that run `segment`, as named in the table."""
STUDENT, TEACHER = "tiatoolbox, student", "tiatoolbox, HoVerNet-fast"
"""Programs that run tiatoolbox's engine."""
FLAGS = {
    LOCAL: ["--backend", "local"],
    RAY: ["--backend", "ray"],
    TORCH: ["--backend", "local", "--runtime", "torch"],
}
"""Flags of the programs that run `segment`."""
STAGES = (Stage.SURVEY, Stage.READ, Stage.INFER, Stage.WRITE, Stage.POST, Stage.FINALIZE)


def prepare(folder: Path) -> None:
    """Write the densest field of SLIDE as a pyramidal TIFF to `folder`, with a cohort.csv."""
    with open_slide(SlideRecord("benchmark", SLIDE, row=1)) as reader:
        pixels = reader.read(DENSE_FIELD, Grid.over(reader.info.level0, reader.info.mpp, MPP))
    write_pyramidal_tiff(folder / REGION, pixels, MPP)
    (folder / "cohort.csv").write_text(f"path,slide_id\n{REGION},slide\n")


def run_segment(folder: Path, program: str) -> dict[str, Any]:
    """Run `segment` with FLAGS[program]; return the times in seconds, also by stage, and the number of nuclei.

    `folder`: folder that `prepare` filled. The output is deleted.
    """
    out = folder / "out"
    command = ["segment", str(folder / "cohort.csv"), "-o", str(out), *FLAGS[program]]
    command += ["--batch", str(BATCH), "--tissue", "all"]
    _, process = _timed([sys.executable, "-c", "from hover_batch.__main__ import main; main()", *command])
    events = [json.loads(line) for line in (out / "logs" / "events.jsonl").read_text().splitlines()]
    slide = json.loads((out / "slides" / "slide" / "slide.json").read_text())
    stages = json.loads((out / "slides" / "slide" / "timings.json").read_text())
    started = min(start for event in events for start, _ in event.get("spans", {}).values())
    ended = next(datetime.fromisoformat(event["time"]) for event in events if event["event"] == "slide_done")
    shutil.rmtree(out)
    work = ended.timestamp() - started
    return {"process": process, "work": work, "nuclei": slide["nuclei"], "stages": stages}


class CpuSeconds(Seconds):
    """Seconds by stage that counts the CPU time of all threads of this process."""

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Measure the block and add its CPU time to `stage`, even if it raises an exception."""
        started, cpu_started = time.time(), time.process_time()
        try:
            yield
        finally:
            self.add_span(stage, time.process_time() - cpu_started, (started, time.time()))


def budget_child(folder: Path, slides: int) -> list[dict[str, float]]:
    """Process SLIDE `slides` times in this process; return the CPU seconds of each time, by stage.

    Further keys are `mm2`, the area of the predicted tiles, and `densest_mb`, the size of the largest shard. The output
    is written to `folder`. From then on, this process measures stages with CpuSeconds.
    """
    rows = [f"{SLIDE},slide{i}" for i in range(slides)]
    (folder / "cohort.csv").write_text("\n".join(["path,slide_id", *rows]) + "\n")
    pipeline.Seconds = local.Seconds = CpuSeconds  # type: ignore[attr-defined]
    local.block_reader = _read_in_turn  # type: ignore[attr-defined]  # CPU time cannot be split between threads
    Computed.clock = staticmethod(time.process_time)
    command = ["segment", str(folder / "cohort.csv"), "-o", str(folder / "out"), *FLAGS[LOCAL]]
    app([*command, "--batch", str(BATCH), "--threads", "1"], standalone_mode=False)
    tile_mm2 = (find_package("starter").card.tile_out * MPP / 1000) ** 2
    times = []
    for i in range(slides):
        layout = RunLayout(folder / "out").slide(f"slide{i}")
        tiles = json.loads(layout.slide_json.read_text())["tiles"]
        shards = [path.stat().st_size for path in (layout.predictions_zarr / "c").rglob("*") if path.is_file()]
        stages = json.loads(layout.timings_json.read_text())
        times.append({**stages, "mm2": tiles * tile_mm2, "densest_mb": max(shards) / 1e6})
    return times


def _read_in_turn(reader: SlideReader | None, work: SlideWork) -> ReadBlocks:
    """Return a function that reads blocks one after the other, and nothing ahead."""

    def read(boxes: list[Box], seconds: Seconds) -> Iterator[NDArray[np.uint8]]:
        assert reader is not None
        for box in boxes:
            with seconds.measure(Stage.READ):
                block = reader.read(box, work.grid)
            yield block

    return read


def budget(repeats: int) -> dict[str, Any]:
    """Measure in a new process the CPU seconds per mm² of each stage; return them for the first and for later slides.

    Of the later slides, `repeats` in number, the median is returned.
    """
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "benchmarks.segment", "--budget-child", name, "--repeats", str(repeats)]
        slides = json.loads(_timed(command)[0].splitlines()[-1])
    mm2 = slides[0]["mm2"]
    stages = {stage: statistics.median(slide[stage] for slide in slides[1:]) / mm2 for stage in STAGES}
    return {
        "mm2": mm2,
        "core_seconds_per_mm2": stages,
        "first_slide_core_seconds_per_mm2": {stage: slides[0][stage] / mm2 for stage in STAGES},
        "core_seconds_per_mm2_without_network": sum(stages.values()) - stages[Stage.INFER],
        "densest_unit_mb_per_mpx": slides[0]["densest_mb"] / (InferSettings().unit ** 2 / 1e6),
    }


def _show_budget(found: dict[str, Any]) -> None:
    stages, first = found["core_seconds_per_mm2"], found["first_slide_core_seconds_per_mm2"]
    print(f"{'CPU s per mm²':18} {'later':>9} {'first':>10}")
    for stage in STAGES:
        print(f"{stage:18} {stages[stage]:9.2f} {first[stage]:10.2f}")
    others = found["core_seconds_per_mm2_without_network"]
    print(f"{'without infer':18} {others:9.2f} {sum(first.values()) - first[Stage.INFER]:10.2f}")
    print(f"stored predictions of the densest unit: {found['densest_unit_mb_per_mpx']:.2f} MB per million pixels")
    for cores in (8, 16, 32, 64):
        print(f"{cores} cores, with the network on a GPU: {others / cores:.3f} s per mm²")


def run_tiatoolbox(folder: Path, program: str) -> dict[str, Any]:
    """Run STUDENT or TEACHER in a new process; return the times in seconds and the number of nuclei.

    `folder`: folder that `prepare` filled.
    """
    printed, process = _timed([sys.executable, "-m", "benchmarks.segment", "--child", program, str(folder)])
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return {"process": process, **found}


def _timed(command: list[str]) -> tuple[str, float]:
    """Run a command; return its stdout and its time in seconds. SystemExit if it fails."""
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout, seconds


def tiatoolbox_child(program: str, folder: Path) -> dict[str, Any]:
    """Run tiatoolbox's engine on the field, in this process; return the `work` time and the number of nuclei.

    `program`: STUDENT or TEACHER. `folder`: folder that `prepare` filled; the output is written to it. Warnings are
    switched off in this process.
    """
    warnings.simplefilter("ignore")
    from tiatoolbox.models.engine.io_config import IOInstanceSegmentorConfig
    from tiatoolbox.models.engine.multi_task_segmentor import MultiTaskSegmentor
    from tiatoolbox.wsicore.wsireader import OpenSlideWSIReader

    model, tile_in, tile_out = _model(program)
    mpp = {"units": "mpp", "resolution": MPP}
    engine = MultiTaskSegmentor(
        model=model, batch_size=BATCH, num_workers=len(os.sched_getaffinity(0)), device="cpu", verbose=False
    )
    ioconfig = IOInstanceSegmentorConfig(
        input_resolutions=[mpp],
        output_resolutions=[mpp] * 3,
        margin=128,
        tile_shape=[1024, 1024],
        patch_input_shape=[tile_in, tile_in],
        patch_output_shape=[tile_out, tile_out],
        stride_shape=[tile_out, tile_out],
    )
    # Given a path, tiatoolbox would read the whole file as one image.
    reader = OpenSlideWSIReader(folder / REGION, mpp=(MPP, MPP))
    started = time.monotonic()
    engine.run(
        [reader],
        ioconfig=ioconfig,
        patch_mode=False,
        save_dir=folder / "tiatoolbox",
        overwrite=True,
        output_type="qupath",
        auto_get_mask=False,
    )
    work = time.monotonic() - started
    nuclei = sum(len(json.loads(path.read_text())["features"]) for path in (folder / "tiatoolbox").glob("*.json"))
    return {"work": work, "nuclei": nuclei}


def _model(program: str) -> tuple[Any, int, int]:
    """Return the engine's model, and the sides in pixels of its input and output tiles."""
    from collections import OrderedDict

    from tiatoolbox.models.architecture.hovernet import HoVerNet

    if program == TEACHER:

        class Teacher(HoVerNet):  # type: ignore[misc]  # untyped
            """HoVerNet with dark pixels as its foreground.

            With random weights it would find no nuclei, and the engine fails without nuclei.
            """

            def forward(self, images: Any) -> Any:
                maps = super().forward(images)
                margin = (images.shape[-1] - maps["np"].shape[-1]) // 2
                dark = DARK - images[:, :, margin:-margin, margin:-margin].mean(dim=1)
                maps["np"][:, 0], maps["np"][:, 1] = -dark, dark
                return maps

        return Teacher(num_types=6, mode="fast"), 256, 164

    from hover_batch.model.heads import HV, NP, Heads
    from hover_batch.model.package import find_package, load_network

    package = find_package("starter")
    card = package.card
    types = Heads(len(card.taxonomy.classes)).tp
    margin = card.margin

    class Student(HoVerNet):  # type: ignore[misc]  # untyped
        """Network of the student with HoVerNet's post-processing."""

        def __init__(self) -> None:
            super().__init__(num_types=len(card.taxonomy.classes), mode="fast")
            for name in [name for name, _ in self.named_children()]:
                delattr(self, name)
            self.network = load_network(package)

        def forward(self, images: Any) -> Any:
            maps = self.network(images / 255)[:, :, margin:-margin, margin:-margin]
            return OrderedDict(tp=maps[:, types], np=maps[:, NP], hv=maps[:, HV])

    return Student(), card.tile_in, card.tile_out


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs, whose median is reported")
    parser.add_argument(
        "--teacher-repeats", type=int, default=1, help="number of runs of HoVerNet, which take minutes on a CPU"
    )
    parser.add_argument("--budget", action="store_true", help="report CPU seconds per mm² by stage instead")
    parser.add_argument("--budget-child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.budget_child:
        print(json.dumps(budget_child(arguments.budget_child, arguments.repeats + 1)))
        return
    if arguments.child:
        print(json.dumps(tiatoolbox_child(arguments.child[0], Path(arguments.child[1]))))
        return
    if not SLIDE.exists():
        raise SystemExit(f"{SLIDE}: no such file; put this TCGA slide there")
    if arguments.budget:
        result = budget(arguments.repeats)
        _show_budget(result)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        return
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in (*FLAGS, STUDENT, TEACHER)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for number in range(arguments.repeats):
            for program in FLAGS:
                runs[program].append(run_segment(folder, program))
            runs[STUDENT].append(run_tiatoolbox(folder, STUDENT))
            if number < arguments.teacher_repeats:
                runs[TEACHER].append(run_tiatoolbox(folder, TEACHER))
            print(f"{number + 1}/{arguments.repeats}", file=sys.stderr, flush=True)
    medians = {program: _median(its_runs) for program, its_runs in runs.items() if its_runs}
    _show(medians)
    if arguments.json:
        arguments.json.write_text(json.dumps({"median": medians, "runs": runs}, indent=2) + "\n")


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in ("process", "work", "nuclei")}
    if "stages" in runs[0]:
        middle["stages"] = {stage: statistics.median(run["stages"].get(stage, 0.0) for run in runs) for stage in STAGES}
    return middle


def _show(medians: dict[str, dict[str, Any]]) -> None:
    print(f"{'program':28} {'work s':>8} {'process s':>10} {'nuclei':>7} {'work ÷ local':>13} {'process ÷ local':>16}")
    base = medians[LOCAL]
    for program, row in medians.items():
        print(
            f"{program:28} {row['work']:8.1f} {row['process']:10.1f} {row['nuclei']:7.0f} "
            f"{row['work'] / base['work']:13.2f} {row['process'] / base['process']:16.2f}"
        )
    stages = base["stages"]
    print("stages of segment, local:", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items()))
    print(f"  together {sum(stages.values()):.1f} s, {sum(stages.values()) / base['work']:.0%} of the work")


if __name__ == "__main__":
    main()
