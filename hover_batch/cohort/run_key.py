"""Decide whether results belong together: by the run key of a slide, and by the identity of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hover_batch.cohort.record import Url
from hover_batch.errors import SettingsChanged
from hover_batch.files import to_json
from hover_batch.formatting import listed


def run_key(model_sha256: str, results_key: Mapping[str, Any], slide_fingerprint: str, schema_version: int) -> str:
    """Return the run key of a slide, the hex SHA-256 of everything that its results depend on.

    Equal keys mean equal results. Whole floats in `results_key` count as integers, so that 8.0 and 8 give the same key.

    `model_sha256`: hash of the model's package. `results_key`: settings that change results. `slide_fingerprint`:
    fingerprint of the slide, followed by the hash of its mask if there is one. `schema_version`: version of the table's
    columns.
    """
    parts = {
        "model": model_sha256,
        "results": _integers_where_whole(results_key),
        "slide": slide_fingerprint,
        "schema": schema_version,
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ModelId:
    """Model of a run."""

    id: str
    """Name of the model."""
    sha256: str
    """Hash of its package, weights and card."""


def run_identity(model: ModelId, results_key: Mapping[str, Any], schema_version: int) -> dict[str, Any]:
    """Return what all results of a run have in common, as JSON values by name for run.json.

    The names are model_id, model_sha256, results_key and schema_version. Whole floats in the results key become
    integers.

    `model`: model of the run. `results_key`: settings that change results. `schema_version`: version of the table's
    columns.
    """
    identity = {
        "model_id": model.id,
        "model_sha256": model.sha256,
        "results_key": _integers_where_whole(results_key),
        "schema_version": schema_version,
    }
    # Through JSON, so that it compares equal to what an earlier start stored.
    return dict(json.loads(to_json(identity)))


def refuse_changes(root: Path | Url, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise SettingsChanged if the identity of the run in `root` differs from that of the run to be started.

    The message has a line with the stored and the wanted value of each difference. Models with the same hash count as
    the same, even if their names differ.

    `root`: the run's folder, for the message. `stored`, `wanted`: identities of the run there and of the new one, as
    `run_identity` returns them.
    """
    changes = []
    if stored.get("model_sha256") != wanted["model_sha256"]:
        changes.append(f"  model: {_model_of(stored)} → {_model_of(wanted)}")
    stored_values = _flat({"schema_version": stored.get("schema_version"), **stored.get("results_key", {})})
    wanted_values = _flat({"schema_version": wanted["schema_version"], **wanted["results_key"]})
    for name in sorted(stored_values.keys() | wanted_values.keys()):
        stored_value, wanted_value = stored_values.get(name, "not set"), wanted_values.get(name, "not set")
        if stored_value != wanted_value:
            changes.append(f"  {name}: {stored_value} → {wanted_value}")
    if changes:
        raise SettingsChanged(
            "\n".join([f"--output {root}: holds results of other settings (in the folder → now):", *changes])
            + "\nName another --output, use the same settings, or give --force to remove those results and start again."
        )


def refuse_other_slides(root: Path | Url, stored: Mapping[str, str | None], run_keys: Mapping[str, str]) -> None:
    """Raise SettingsChanged if the run key of a finished slide in `root` differs from that of the cohort's slide.

    Call it after `refuse_changes`: model and settings are then the same, and the file, pixel size or mask must differ.

    `root`: the run's folder, for the message. `stored`: run keys of finished slides by slide_id; None for slides that
    are not finished. `run_keys`: run keys of the cohort's slides by slide_id; all slides of `stored` must be in it.
    """
    changed = [slide_id for slide_id, key in stored.items() if key not in (None, run_keys[slide_id])]
    if changed:
        raise SettingsChanged(
            f"--output {root}: {listed(changed)}: finished with another file, mpp or mask "
            "than the cohort has now. Give these slides another slide_id or name another --output; --force "
            "removes all results in the folder and starts again."
        )


def _model_of(identity: Mapping[str, Any]) -> str:
    return f"{identity.get('model_id')} (sha256 {str(identity.get('model_sha256'))[:12]}…)"


def _integers_where_whole(value: Any) -> Any:
    """Convert whole floats to integers, so that 8 in a settings file equals the default of 8.0."""
    if isinstance(value, Mapping):
        return {key: _integers_where_whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names, such as post.halo."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
