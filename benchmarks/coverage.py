"""Measure whether the intervals of counts, and calibrated scores, hold on tissue that a network has never seen.

Train a network without each of some sources, then measure the error of counts on the fold val of the other sources, as
`kd package` does, and try its intervals on all images of the source that was left out:

    hover-batch kd train --data nuclei/ --preset starter --out runs/without_tnbc --steps 250 --epoch-steps 250 \
        --size 128 --threads 1 --source consep=.29 …      # the starter's shares, without tnbc
    python -m benchmarks.coverage --data nuclei/ tnbc=runs/without_tnbc/checkpoint.pt … -o coverage.json

`--images` limits the number of images of a source, drawn at random. Results are added to an existing file. Without
checkpoints, the intervals in that file are fitted and tried again from the numbers of nuclei that it holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from hover_batch.config import InferSettings
from hover_batch.files import read_json, write_atomically
from hover_batch.model.architectures import architecture
from hover_batch.model.card import Card
from hover_batch.model.images import batch_of, predict_image
from hover_batch.model.package import find_package
from hover_batch.model.predict import Predictor
from hover_batch.taxonomy import Taxonomy
from hover_batch.uncertainty import CountError
from kd.data.classes import fully_annotated
from kd.data.datasets import MPP, read_data
from kd.data.samples import Sample
from kd.evaluation.calibrate import calibrate
from kd.evaluation.count_error import CountedImage, fit_count_error
from kd.evaluation.measured_errors import MIN_IMAGES, paired_images, tried_on
from kd.training.config import STARTER_SHARES
from kd.training.initial_weights import build_network
from kd.training.state import read_checkpoint


def main() -> None:
    """Read the arguments, and write the results of all sources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("left_out", nargs="*", metavar="SOURCE=CHECKPOINT")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=10**6)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    sources = (read_json(given.output) or {}).get("sources", {})
    if not given.left_out:
        write(given.output, {source: refitted(result) for source, result in sources.items()})
    for item in given.left_out:
        source, _, checkpoint = item.partition("=")
        sources[source] = measure(source, Path(checkpoint), given.data, given.images)
        write(given.output, sources)


def write(output: Path, sources: dict[str, Any]) -> None:
    """Write the results of all `sources`, and print the coverage of each and of all together."""
    report = {"sources": sources, "pooled": pooled(list(sources.values()))}
    write_atomically(output, json.dumps(report, allow_nan=False) + "\n")
    for source, result in sources.items():
        print(f"{source}: {result['coverage']}, {result['total']}")
    print(report["pooled"], flush=True)


def measure(source: str, checkpoint: Path, data: Path, most: int) -> dict[str, Any]:
    """Return the error of counts without `source`, and how it holds on at most `most` of its images."""
    saved = read_checkpoint(checkpoint)
    if source in saved["record"]["data"]["train"]:
        raise SystemExit(f"{checkpoint}: was trained on {source}")
    taxonomy = Taxonomy.from_json(saved["record"]["taxonomy"])
    network = build_network(saved["config"], len(taxonomy.classes))
    network.load_state_dict(saved["shipped"])
    tile_in, tile_out = architecture("unet").tile
    card = Card(
        name=f"without_{source}", architecture="unet", encoder=saved["config"]["encoder"], taxonomy=taxonomy,
        mpp=MPP, tile_in=tile_in, tile_out=tile_out, sobel=find_package("starter").card.sobel, licence="",
    )  # fmt: skip
    predictor = Predictor(network, card, InferSettings(threads=1, batch=batch_of(card)))
    known = [name for name in STARTER_SHARES if name in saved["record"]["data"]["train"]]
    val = fully_annotated(read_data(data, ["val"], [name for name in known if name != "dsb2018"]).samples)
    unseen = read_data(data, ["train", "val", "test"], [source]).samples
    chosen = np.sort(np.random.default_rng(0).permutation(len(unseen))[:most])
    maps = {s.image_sha256: predict_image(predictor, s.image) for s in (*val, *(unseen[i] for i in chosen))}

    def paired(samples: Sequence[Sample]) -> Any:
        queue = iter(samples)
        return paired_images(lambda image: maps[next(queue).image_sha256], samples, constants, taxonomy)

    queue = iter(val)
    constants = calibrate(lambda image: maps[next(queue).image_sha256], val).constants
    fitted_on, tested_on = paired(val), paired([unseen[i] for i in chosen])
    return {
        "steps": saved["step"],
        **intervals([image.count for image in fitted_on], [image.count for image in tested_on]),
        "evidence": {"val": tried_on(fitted_on, fitted_on), "unseen": tried_on(tested_on, fitted_on)},
    }


def refitted(result: dict[str, Any]) -> dict[str, Any]:
    """Return the stored `result` of a source with intervals that are fitted again, and their coverage."""
    images = {name: [CountedImage(**row) for row in result[name]] for name in ("fitted_on", "tested_on")}
    again = result | intervals(images["fitted_on"], images["tested_on"])
    error = CountError.from_json(again["count_error"])
    for part, name in (("val", "fitted_on"), ("unseen", "tested_on")):
        for source, found in again["evidence"][part].items():
            hits = [image.is_covered(error) for image in images[name] if image.source == source]
            found |= {"covered": hits.count(True), "of": len(hits) - hits.count(None)}
    return again


def intervals(fitted_on: Sequence[CountedImage], tested_on: Sequence[CountedImage]) -> dict[str, Any]:
    """Return the error of counts in the images `fitted_on`, and how its intervals hold on each of `tested_on`.

    `total`: the same for all of `tested_on` together, as slides of one source: the interval of true ÷ counted nuclei.
    """
    error = fit_count_error(fitted_on)
    assert error is not None
    hits = [hit for image in tested_on if (hit := image.is_covered(error)) is not None]
    counted = sum(image.predicted for image in tested_on)
    interval = error.interval([(image.predicted, image.mm2) for image in tested_on])
    assert interval is not None
    low, high = interval
    return {
        "count_error": error.to_json(),
        "fitted_on": [asdict(image) for image in fitted_on],
        "tested_on": [asdict(image) for image in tested_on],
        "coverage": coverage(sum(hits), len(hits)),
        "total": {"low": low / counted, "high": high / counted, "true": sum(i.true for i in tested_on) / counted},
    }


def pooled(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the coverage of all sources together."""
    parts = [result["coverage"] for result in results]
    return coverage(sum(p["covered"] for p in parts), sum(p["of"] for p in parts))


def coverage(covered: int, of: int) -> dict[str, Any]:
    """Return a share with its 95 % Clopper-Pearson interval, which takes the images as independent."""
    interval = binomtest(covered, of).proportion_ci(0.95, method="exact")
    ends = {"low": round(float(interval.low), 3), "high": round(float(interval.high), 3)}
    return {"covered": covered, "of": of, **ends, "claim": of >= MIN_IMAGES}


if __name__ == "__main__":
    main()
