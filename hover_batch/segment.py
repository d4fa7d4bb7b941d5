"""Run a cohort: check its rows, headers and settings, process its slides, and write the summary."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.ledger import Ledger, SlideFailure
from hover_batch.cohort.manifest import Cohort, read_cohort
from hover_batch.cohort.record import SlideRecord, Stage, Url
from hover_batch.cohort.run_folder import COMPLETING, estimate_line, estimate_of, read_run, slide_if_done
from hover_batch.cohort.run_key import ModelId
from hover_batch.config import AUTO_BATCH, Settings
from hover_batch.dataset.update import add_run
from hover_batch.dataset.writer import check_place
from hover_batch.errors import DISK_FULL, HoverBatchError, InputError, SlideError, exit_code
from hover_batch.executor.backend import OpenBackend, open_backend, resolve_here
from hover_batch.executor.progress import CohortProgress
from hover_batch.executor.protocol import RunContext
from hover_batch.executor.upload import RunUpload, Uploaded
from hover_batch.export.summary import cohort_summary, refuse_altered, slide_summary, with_record_columns, write_summary
from hover_batch.formatting import LISTED, counted, listed
from hover_batch.logs import LogFormat, json_line
from hover_batch.model.package import Package, find_package
from hover_batch.nuclei.table import SCHEMA_VERSION
from hover_batch.plan import check_settings, plan_cohort
from hover_batch.quality.flags import FLAG_NAMES, Flag, flag_slides, summary_columns
from hover_batch.slide_work import result_key
from hover_batch.stored_run import StoredRun
from hover_batch.taxonomy import Taxonomy

RECORDED = ("hover-batch", "torch", "segmentation-models-pytorch", "tiatoolbox", "openslide-python", "zarr", "numpy")
"""Packages whose versions can change results, for versions.json."""


@dataclass(frozen=True)
class Outcome:
    """Result of a run."""

    layout: RunLayout
    """Paths of the run's results."""
    slides: tuple[dict[str, Any], ...]
    """Content of slide.json of each finished slide, in the order of the cohort."""
    estimates: tuple[dict[str, Any], ...]
    """Content of estimate.json of each slide whose density is estimated from a part of it, in the same order."""
    failures: tuple[SlideFailure, ...]
    """Rows of failures.csv: failures of this start, by row of the cohort."""
    flags: Mapping[str, tuple[Flag, ...]]
    """Quality flags by slide_id, of all finished slides and of those that --fail-on failed; empty tuples included."""
    model_busy: float | None
    """Fraction (0 to 1) of the time in which the networks computed; None if this start predicted nothing."""
    command: str
    """Command that resumes the run."""
    uploaded: Uploaded | None = None
    """Result of the uploads; None if the results stay in the folder."""

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 all slides done, 3 some rows, slides or uploads failed, 4 no slide done.

        Slides whose density is estimated count as done.
        """
        not_uploaded = len(self.uploaded.left) if self.uploaded else 0
        return exit_code(len(self.slides) + len(self.estimates), len(self.failures) + not_uploaded)

    def closing_lines(self) -> list[str]:
        """Return lines for stdout about the outcome.

        They give the numbers of slides, the first LISTED results, flags and failures, and the uploads.
        """
        failed = len({failure.row for failure in self.failures})  # an invalid row may have several faults
        slides = f"{counted(len(self.slides), 'slide')} done"
        if self.estimates:
            slides += f", {len(self.estimates):,} estimated"
        lines = [f"{slides}, {failed} failed; summary: {self.layout.summary_csv}"]
        if self.model_busy is not None:
            lines.append(f"networks busy {self.model_busy:.0%} of the time from the first tile to the last")
        for estimated in self.estimates[:LISTED]:
            paths = self.layout.slide(estimated["slide_id"])
            lines.append(f"{paths.slide_id}: {estimate_line(estimated['estimate'])}")
            lines.append(f"  table    {paths.sampled_nuclei_parquet} (of these clusters only)")
        if self.estimates:
            lines.append(f"the same command {COMPLETING} completes the estimated slides")
        for slide in self.slides[:LISTED]:
            paths = self.layout.slide(slide["slide_id"])
            lines.append(f"{slide['slide_id']}: {slide['nuclei']:,} nuclei")
            lines.append(f"  table    {paths.nuclei_parquet}")
            overlay = paths.overlay_jpg if paths.overlay_jpg.exists() else "none, since --from reads no slides"
            lines.append(f"  overlay  {overlay}")
            if paths.predictions_zarr.exists():
                lines.append(f"  store    {paths.predictions_zarr}")
        if len(self.slides) > LISTED:
            lines.append(f"… and {len(self.slides) - LISTED} more in {self.layout.slides}")
        flagged = {slide_id: flags for slide_id, flags in self.flags.items() if flags}
        if flagged:
            lines.append(f"flagged: {counted(len(flagged), 'slide')} of {len(self.flags):,}; look at them before use")
            first = list(flagged.items())[:LISTED]
            lines += [f"  {slide_id}: {flag.name}: {flag.sentence}" for slide_id, flags in first for flag in flags]
        if len(flagged) > LISTED:
            lines.append(f"  … and {len(flagged) - LISTED:,} more in the column flags of {self.layout.summary_csv}")
        if older := sum("quality" not in slide for slide in self.slides):
            lines.append(f"{counted(older, 'slide')} of an older version: not checked for focus, ink, stain and scores")
        if self.failures:
            lines.append(f"failures: {self.layout.failures_csv}")
            lines += [f"  {f.slide_id}: {f.reason}" for f in self.failures[:LISTED]]
        if self.uploaded:
            lines += self.uploaded.lines(self.layout.root, self.command)
        return lines


def run_segment(
    source: str | Cohort | StoredRun,
    output: Path,
    settings: Settings,
    *,
    skip_invalid: bool,
    force: bool,
    command: Sequence[str],
    retry_failed: bool = False,
    fail_on: Collection[str] = (),
    log_format: LogFormat = LogFormat.text,
    bucket: Url | None = None,
) -> Outcome:
    """Run the cohort `source` into the folder `output`, or resume the run there. Return its outcome.

    Slides that an earlier start finished are skipped. At the end, failures.csv and the summary are written. Failures of
    single slides and of uploads are part of the outcome. Call it from the main thread, so that Ctrl-C is handled.

    `source`: a CSV, folder or glob pattern; a cohort that was read already; or a stored run, from whose predictions new
    tables are made. `settings`: settings of the run. `skip_invalid`: leave out invalid rows instead of stopping.
    `force`: remove the results in `output` and `bucket` first. `command`: command line, for run.json.

    `retry_failed`: also retry quarantined slides. `fail_on`: names of quality flags; slides that have one are recorded
    as failed, but their results stay. `log_format`: format of the messages on stderr. `bucket`: folder in cloud storage
    to which the results are also uploaded (see `RunUpload`); None to keep them on disk only.

    Before a slide is processed, InputError if a row, a setting, the output folder or the bucket is invalid,
    SettingsChanged (an InputError) if one of these folders holds results of other settings, and PackageError if the
    model package cannot be read.

    Later, PackageError if the model cannot be loaded, TooManyFailures if more slides failed than the settings allow,
    HoverBatchError if Ray does not start or the network crashes repeatedly, InputError if a node or device cannot be
    used, OSError if a file cannot be written, and KeyboardInterrupt after Ctrl-C or SIGTERM.
    """
    if unknown := [name for name in fail_on if name not in FLAG_NAMES]:
        raise InputError(f"--fail-on {unknown[0]}: is not a flag; flags are {', '.join(FLAG_NAMES)}")
    layout = RunLayout(output)
    upload = RunUpload(bucket, layout) if bucket else None
    predicts, auto_batch = not isinstance(source, StoredRun), settings.infer.batch == AUTO_BATCH
    if isinstance(source, StoredRun):
        source.check(settings, output, force=force)
        package, plan = source.package, source.plan
        taxonomy = check_settings(settings, package.card)
    else:
        package = find_package(settings.model)
        taxonomy = check_settings(settings, package.card)
        settings = resolve_here(settings, package.card)
        plan = plan_cohort(read_cohort(source) if isinstance(source, str) else source, package.card)
    if not skip_invalid:
        plan.raise_if_faulty()
    versions = {"python": platform.python_version(), **{name: version(name) for name in RECORDED}}
    records = plan.cohort.records
    with (
        Ledger(layout) as ledger,
        upload or nullcontext(),  # outside of the backend, which waiting uploads do not need
        open_backend(settings, layout, predicts=predicts) as backend,
        CohortProgress(len(records), log_format) as progress,
    ):
        settings = backend.settings
        if auto_batch:
            settings = _with_batch(settings, layout, package, backend, force)
        run_keys = {slide.record.slide_id: result_key(slide, package, settings) for slide in plan.slides}
        ledger.start(
            settings=settings,
            model=ModelId(package.card.name, package.sha256),
            schema_version=SCHEMA_VERSION,
            cohort=plan.cohort,
            versions=versions,
            command=command,
            force=force,
            run_keys=run_keys,
        )
        if auto_batch:
            progress.say(f"batch: {counted(settings.infer.batch, 'tile')} (auto)")
        for warning in plan.cohort.warnings:
            progress.warn(warning)
        if orphans := ledger.orphans(plan.cohort):
            progress.warn(
                f"{output} holds results of {counted(len(orphans), 'slide')} not in this cohort ({listed(orphans)}); "
                "they are kept, but slides.csv and the summary list only this cohort"
            )
        for fault in plan.cohort.faults:
            ledger.record_failure(fault.slide_id_or_path, fault.row, "", Stage.CHECK, fault.message)
        context = RunContext.of(package, settings, ledger, progress, run_keys)
        recorder = context.recorder
        if upload:
            upload.begin(run_keys, progress, ledger.events.append, force=force)
            recorder.on_done = upload.add
        has_remote = any(isinstance(slide.record.path, Url) and slide.stored is None for slide in plan.slides)
        if has_remote:
            context.copies.open()
        stopped = True
        try:
            for record, reason in plan.unreadable:
                recorder.fail_unreadable(record, reason)
            unfinished = [slide for slide in plan.slides if not recorder.skip_done(slide)]
            to_run = [slide for slide in unfinished if not recorder.skip_quarantined(slide, retry=retry_failed)]
            backend.run(context, to_run)
            flags = _flag(ledger, records, fail_on)
            stopped = False
        finally:
            if has_remote:
                context.copies.close()
            try:
                ledger.finish(plan.cohort, recorder.model_busy, stopped=stopped)
            except OSError as error:  # the error that stopped the run is more important
                if not (stopped and error.errno in DISK_FULL):
                    raise
        failures = ledger.failures()
        # By row, since an invalid row may have the slide_id of a slide that was run.
        failed = {failure.row for failure in failures}
        done = [record for record in records if record.row not in failed]
        finished = [_finished(layout, record.slide_id) for record in done]
        left_out = [record for record in records if record.row in failed]
        _summarise(layout, taxonomy, done, finished, left_out, flags, recorder.model_busy)
    return Outcome(
        layout,
        slides=tuple(slide for slide in finished if "estimate" not in slide),
        estimates=tuple(slide for slide in finished if "estimate" in slide),
        failures=failures,
        flags=flags,
        model_busy=recorder.model_busy,
        command=shlex.join(["hover-batch", *command]),
        uploaded=upload.result() if upload else None,
    )


def _with_batch(settings: Settings, layout: RunLayout, package: Package, backend: OpenBackend, force: bool) -> Settings:
    """Return the settings with `auto` replaced by a batch size: that of the run to be resumed, if there is one."""
    run = None if force else read_run(layout, "--output")
    batch = run["results_key"]["infer"]["batch"] if run else settings.infer.batch
    if batch == AUTO_BATCH:
        batch = backend.auto_batch(package, settings.infer)
    return replace(settings, infer=replace(settings.infer, batch=batch))


def _flag(ledger: Ledger, records: Sequence[SlideRecord], fail_on: Collection[str]) -> dict[str, tuple[Flag, ...]]:
    """Return the flags of the finished slides, and record those with a flag of `fail_on` as failed.

    Slides whose density is estimated are not measured, and have no flags.
    """
    failed = {failure.row for failure in ledger.failures()}
    done = {record.slide_id: record for record in records if record.row not in failed}
    finished = {slide_id: _finished(ledger.layout, slide_id) for slide_id in done}
    flags = flag_slides({slide_id: slide for slide_id, slide in finished.items() if "estimate" not in slide})
    for slide_id, record in done.items():
        for flag in flags.get(slide_id, ()):
            if flag.name in fail_on:
                reason = f"--fail-on {flag.name}: {flag.sentence}"
                ledger.record_failure(slide_id, record.row, record.path, Stage.QUALITY, reason)
    return flags


def _finished(layout: RunLayout, slide_id: str) -> dict[str, Any]:
    """Return the content of a slide's slide.json; of its estimate.json if its density is estimated."""
    slide = layout.slide(slide_id)
    if (values := slide_if_done(slide) or estimate_of(slide)) is None:
        raise InputError(f"{slide.slide_json}: was changed during the run; repeat the command")
    return values


def _summarise(
    layout: RunLayout,
    taxonomy: Taxonomy,
    done: Sequence[SlideRecord],
    slides: Sequence[dict[str, Any]],
    failed: Sequence[SlideRecord],
    flags: Mapping[str, tuple[Flag, ...]],
    model_busy: float | None,
) -> None:
    """Write summary.csv and summary.parquet. `slides`: content of slide.json or estimate.json of each of `done`."""
    rows, tables = [], []
    for record, slide in zip(done, slides, strict=True):
        row = with_record_columns(slide["summary"], record, taxonomy)
        if "estimate" not in slide:
            refuse_altered(slide["summary"], taxonomy.nuclei, layout.slide(record.slide_id).slide_json)
            row |= summary_columns(slide, flags[record.slide_id])
            tables.append(layout.slide(record.slide_id).nuclei_parquet)
        rows.append(row)
    rows += [
        slide_summary(record, taxonomy, status="failed", nuclei=None, tissue_mm2=None, seconds={})
        | {"flags": ";".join(flag.name for flag in flags.get(record.slide_id, ()))}
        for record in failed
    ]
    rows.append(cohort_summary(rows, tables, taxonomy, model_busy))
    write_summary(rows, taxonomy, layout.summary_csv, layout.summary_parquet)


def check_dataset(dataset: Path | Url, *outputs: Path | Url) -> None:
    """Check, before the run, that slides can be added to the data set at `dataset`.

    In a bucket, a small test file is written and removed; nothing is written to a folder.

    `dataset`: folder or URL of the data set; it need not exist. `outputs`: folders or URLs of the run's results and
    working files.

    InputError if `dataset` is one of `outputs`, holds files but no data set, has a data set that this version cannot
    change, or is a bucket that cannot be written; OSError or, for a bucket, UploadError if it cannot be read.
    """
    if _resolved(dataset) in map(_resolved, outputs):
        raise InputError(f"--dataset {dataset}: is the folder of --output or --work; name another folder")
    check_place(dataset, "--dataset")


def _resolved(where: Path | Url) -> Path | str:
    return where.text.rstrip("/") if isinstance(where, Url) else where.resolve()


def add_to_dataset(outcome: Outcome, dataset: Path | Url, log_format: LogFormat) -> int:
    """Add the finished slides of a run to a data set, and return the exit code of the command.

    It is the exit code of the run, but at least 3 if a slide was skipped or the data set cannot be used. If the data
    set cannot be used, no error is raised, and a message says how to add the slides later. If no slide is finished, the
    data set is not touched.

    `outcome`: outcome of the run. `dataset`: folder or URL of the data set. `log_format`: format of the messages, which
    go to stderr.
    """

    def say(line: str, level: str = "info") -> None:
        print(json_line(level, line) if log_format is LogFormat.json else line, file=sys.stderr)

    done = [str(slide["slide_id"]) for slide in outcome.slides]
    if not done:
        return outcome.exit_code
    folder = outcome.layout.root
    try:
        added = add_run(folder, dataset, done, lambda line: say(f"data set: {line}"), "--dataset")
    except (HoverBatchError, OSError) as error:
        say(
            f"The slides are done, but are not all in the data set: {error}. When this is resolved, add them with\n"
            f"hover-batch cohort {folder} -o {dataset}",
            "error",
        )
        return max(outcome.exit_code, SlideError.exit_code)
    return max(outcome.exit_code, SlideError.exit_code if added.skipped else 0)
