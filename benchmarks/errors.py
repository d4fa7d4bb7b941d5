"""Measure the errors of a package, as `kd package` stores them: fitted on the folds val and test.

    python -m benchmarks.errors starter --data nuclei/ -o errors.json --diagram reliability.svg

Each source is also tried with what the other sources give. The diagram shows, by source, the frequency with which a
predicted nucleus is one, before and after the calibration by the other sources.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hover_batch.config import InferSettings
from hover_batch.files import write_atomically
from hover_batch.model.images import batch_of, predict_image
from hover_batch.model.package import find_package
from hover_batch.model.predict import load_predictor
from hover_batch.nuclei.systems import splitter_of
from kd.data.datasets import read_data
from kd.evaluation.measured_errors import evidence, fit_scalings, fit_uncertainty, notes, paired_images

FOLDS = ("val", "test")  # of the annotated images, those that trained nothing


def main() -> None:
    """Read the arguments, and write the results and the diagram."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--diagram", type=Path)
    given = parser.parse_args()
    package = find_package(given.model)
    predictor = load_predictor(package, InferSettings(threads=1, batch=batch_of(package.card)))
    paired = paired_images(
        lambda image: predict_image(predictor, image),
        read_data(given.data, FOLDS, None).samples,
        splitter_of(package.card),
        package.card.taxonomy,
    )
    fitted, by_source = fit_uncertainty(paired), evidence(paired)
    scalings = {name: scaling.to_json() for name, scaling in fit_scalings(paired).items()}
    report = {"uncertainty": fitted.to_json(), "scalings": scalings, "sources": by_source}
    write_atomically(given.output, json.dumps(report, indent=1, allow_nan=False) + "\n")
    print("\n".join(notes(fitted, by_source)))
    if given.diagram is not None:
        draw(by_source, given.diagram)


def draw(by_source: Mapping[str, Any], path: Path) -> None:
    """Draw the reliability diagrams of seg_score, one for each source."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "reliability", "svg.fonttype": "none"}
    figure, axes = plt.subplots(1, len(by_source), figsize=(2.2 * len(by_source), 2.6), sharey=True, squeeze=False)
    for axis, (source, found) in zip(axes[0], by_source.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for when, colour in (("before", "0.6"), ("after", "tab:blue")):
            diagram = found["seg_score"][when]
            axis.plot(diagram["predicted"], diagram["observed"], "o-", color=colour, markersize=3, linewidth=1)
        nuclei = found["seg_score"]["before"]["nuclei"]
        axis.set_title(f"{source}\n{found['images']} images, {nuclei:,} nuclei", fontsize=7)
        axis.set(xlim=(0.4, 1), ylim=(0.4, 1))
        axis.tick_params(labelsize=6)
    axes[0][0].set_ylabel("share that are nuclei", fontsize=7)
    figure.supxlabel("seg_score: grey as it is, blue calibrated", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
