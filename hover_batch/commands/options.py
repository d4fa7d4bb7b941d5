"""Arguments and options that several commands share, and their conversion to settings.

A setting is declared in `hover_batch.config` and as an option of a command, whose parameter has the setting's name;
its default and its choices come from config.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.bucket import instead_of_url
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import Url
from hover_batch.cohort.run_folder import note_of_unlisted
from hover_batch.config import SECTION_OF, BackendChoice, Settings, nested
from hover_batch.errors import InputError
from hover_batch.files import given_path, read_whole
from hover_batch.formatting import suggestion
from hover_batch.logs import LogFormat, json_line
from hover_batch.model.cache import VARIABLE as CACHE_VARIABLE

MODEL = "Model and inference"
POST = "Tissue and post-processing"
SAMPLE = "Estimate from a part of each slide"
ENGINE = "Execution"


def setting(flag: str, help: str, panel: str, default: str | None = None, **typer_options: Any) -> Any:
    """Return the typer option of a setting. Users can also give it in the environment.

    The environment variable is HOVER_BATCH_ and the setting's name in capitals, such as HOVER_BATCH_MIN_AREA_PX.

    The command's parameter must have the default None; otherwise --config could not supply the value.

    `flag`: name of the option, such as --min-area-px for the setting min_area_px. `help`: text in the help. `panel`:
    group of options in the help. `default`: description of the default in the help; None to show its value.
    `typer_options`: further arguments of typer.Option.
    """
    name = flag.removeprefix("--").replace("-", "_")
    if default is None:
        settings = Settings().to_dict()
        default = str(settings[SECTION_OF[name]][name] if name in SECTION_OF else settings[name])
    return typer.Option(
        flag,
        help=help,
        envvar=f"HOVER_BATCH_{name.upper()}",
        show_default=default,
        rich_help_panel=panel,
        **typer_options,
    )


def batch_size(text: str) -> int | str:
    """Parse the value of --batch: `auto` (returned as text) or a whole number. ValueError for any other text."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither auto nor a whole number") from None


def share(text: str) -> float:
    """Return a share such as 5% or 0.05 as a fraction (0.05). ValueError if it is not a number or percentage."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a share such as 5%") from None


CohortArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="COHORT",
        help="CSV with a column `path` (see docs/first-cohort.md), a folder of slides, or a glob pattern.",
    ),
]


def local_path(text: str | Path) -> Path:
    """Return `text`, the value of an option or argument or its default, as a path on this machine.

    InputError if it is a URL, or empty.
    """
    if url := Url.of(str(text)):
        raise InputError(
            f"{url}: is a URL, which only data sets and --output of `segment` and `plan` can be; {instead_of_url(url)}"
        )
    return given_path(str(text))


def note_unlisted(run: Path) -> None:
    """Print a note on stderr if the run in `run` has finished slides that slides.csv does not list.

    Errors as in `note_of_unlisted`.
    """
    if note := note_of_unlisted(RunLayout(run)):
        typer.echo(f"note: {note}", err=True)


RunArgument = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Folder of a run, as given to `segment --output` or --work.", parser=local_path),
]
ModelOption = Annotated[
    str | None, setting("--model", "`starter`, a name that `models list` shows, or a .safetensors file.", MODEL)
]
BackendOption = Annotated[
    BackendChoice | None,
    setting(
        "--backend",
        "ray: use all cores and GPUs of this machine or a cluster; local: one process; auto: local for few tiles. "
        "Same results.",
        ENGINE,
    ),
]
CpusOption = Annotated[int | None, setting("--cpus", "CPU cores to use; 0 = all.", ENGINE, "all")]
GpusOption = Annotated[int | None, setting("--gpus", "GPUs to use; 0 = none, -1 = all.", ENGINE, "all")]
AddressOption = Annotated[
    str | None, setting("--address", "Ray cluster to join, as HOST:PORT.", ENGINE, "start Ray on this machine")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        parser=local_path,
        help="TOML file with settings, such as settings.toml of a run; options take precedence.",
        envvar="HOVER_BATCH_CONFIG",
    ),
]
SkipInvalidOption = Annotated[
    bool,
    typer.Option(
        "--skip-invalid",
        help="Run the valid rows of the cohort, and list the faulty ones in failures.csv, instead of stopping.",
    ),
]


def settings_of(ctx: typer.Context, base: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of a command.

    The order of precedence is option, environment variable, --config, `base`, default. Variables of `segment`'s options
    count even if this command has no such option. A class map is read from its file.

    `ctx`: context of the command, with its parameters; typer has already chosen between option and environment
    variable. `base`: nested settings with the names in settings.toml; None if there are none.

    InputError if a file cannot be read, or a setting has an unknown name or an invalid value.
    """
    options = {name: value for name, value in ctx.params.items() if value is not None and name in SECTION_OF}
    options |= _further_variables(ctx)
    if "class_map" in options:
        options["class_map"] = _class_map(options["class_map"])
    from_options = nested(options)
    if ctx.params["model"] is not None:
        from_options["model"] = ctx.params["model"]
    from_files = dict(base or {})
    if ctx.params["config"] is not None:
        from_files = _merged(from_files, read_toml("--config", ctx.params["config"]))
    return Settings.from_dict(_merged(from_files, from_options))


def _further_variables(ctx: typer.Context) -> dict[str, Any]:
    """Return the settings in the environment for which `segment` has an option and this command has none, by name.

    With them, `plan` shows the run that `segment` would do.
    """
    segment: Any = ctx.find_root().command
    options = {option.name: option for option in segment.commands["segment"].params if option.name in SECTION_OF}
    texts = {name: options[name].resolve_envvar_value(ctx) for name in options.keys() - ctx.params.keys()}
    return {name: options[name].type_cast_value(ctx, text) for name, text in texts.items() if text is not None}


def place(text: str) -> Path | Url:
    """Return `text`, the value of an option or argument, as a URL if it is one; otherwise as a path.

    InputError if the URL has a user, password, query or fragment, is in memory, or the text is empty.
    """
    url = Url.of(text)
    if url is not None and str(url) != url.text:
        raise InputError(
            f"{url}: the URL that you gave has a user, a password, a query or a fragment; leave this out, and "
            "give credentials in the environment"
        )
    if url is not None and url.protocol == "memory":  # fsspec supports it, but it would be gone with this process
        raise InputError(f"{url}: memory:// exists only while this command runs; give a folder, or cloud storage")
    return url or given_path(text)


def warn_of_unknown_variables(ctx: typer.Context) -> None:
    """Warn on stderr about environment variables HOVER_BATCH_* that no command reads: misspelt or lower-case ones.

    `ctx`: context of the command. The warnings are lines of JSON if the command's log format is json, else text.
    """
    root, prefix = ctx.find_root(), "HOVER_BATCH_"
    known = {name.removeprefix(prefix) for name in (CACHE_VARIABLE, *_variables(root.command))}
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix(prefix)
        if not variable.upper().startswith(prefix) or variable in (f"{prefix}{one}" for one in known):
            continue
        hint = suggestion(name, known, prefix)
        message = f"the environment variable {variable} is not known, and has no effect{hint}"
        line = json_line("warning", message) if root.obj is LogFormat.json else f"Warning: {message}"
        typer.echo(line, err=True)


def _variables(command: Any) -> Iterator[str]:
    """Yield the environment variables that a command, or any of its subcommands, reads."""
    yield from (option.envvar for option in command.params if option.envvar)
    for subcommand in getattr(command, "commands", {}).values():
        yield from _variables(subcommand)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge section by section; values of `above` take precedence.

    If `above` has a section and `below` a plain value of the same name, the plain value stays, so that
    `Settings.from_dict` rejects it.
    """
    merged = dict(below)
    for key, value in above.items():
        section = merged.get(key, {})
        if not isinstance(value, dict):
            merged[key] = value
        elif isinstance(section, dict):
            merged[key] = {**section, **value}
    return merged


def _class_map(path: Path) -> dict[str, Any]:
    """Read the class map. InputError if the file is empty or cannot be read."""
    class_map = read_toml("--class-map", path)
    if not class_map:
        raise InputError(f'--class-map {path}: is empty; write lines such as neoplastic = ["epithelial"]')
    return class_map


def read_toml(flag: str, path: Path) -> dict[str, Any]:
    """Return the content of the TOML file `path`.

    `flag`: option that gave the path, for the message. InputError if the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(read_whole(path).decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror}); name a TOML file") from error
    except ValueError as error:
        raise InputError(f"{flag} {path}: is not TOML in UTF-8 ({error}); correct it") from error
