"""Targets and losses of each system (see `hover_batch.model.heads.SYSTEMS`).

HoVerNet's are in `targets.py` and `losses.py`. The comparisons of the HoVerNet paper gave DIST and Micro-Net classes by
a softmax over all of them (vqdang/hover_net, `src/model`), which is done here, too. Crops whose classes are not
annotated teach the other targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes

from hover_batch.model.architectures.mask_rcnn import MaskRcnn
from hover_batch.model.heads import DISTANCE_PX, HV
from hover_batch.nuclei.markers import MIN_PIXELS
from kd.training.losses import UNKNOWN, Loss, Targets, weighted_ce
from kd.training.targets import hv_targets

GAP_WEIGHT, GAP_SIGMA = 10.0, 5.0
"""w₀ and σ of the weights near gaps between nuclei, in pixels (Ronneberger et al. 2015, equation 2)."""
AUXILIARY = 0.1
"""Weight of each auxiliary output of Micro-Net. The paper divides by the number of the epoch, from 1 on."""

Planes = Callable[[NDArray[np.int32]], NDArray[np.float32]]
"""Function from instances (y, x) int32, values up to 0 = background, to what a system learns besides foreground and
classes: (2, y, x) float32."""


def distance_targets(instances: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the targets (2, y, x) float32 of DIST: distance to the nucleus's edge / DISTANCE_PX (32), then zeros.

    The distance of a pixel is measured, in pixels, to the nearest pixel outside of its nucleus. Pixels beyond the edge
    of the map count as outside. So the outermost pixels of a nucleus have the distance 1, before the division. The
    background has 0.

    `instances`: (y, x) int32 ids, values up to 0 = background.
    """
    planes = np.zeros((2, *instances.shape), np.float32)
    for number, (rows, columns) in _boxes(instances):
        own = np.pad(instances[rows, columns] == number, 1).astype(np.uint8)
        distance = cv2.distanceTransform(own, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        planes[0, rows, columns] += distance / DISTANCE_PX
    return planes


def gap_targets(instances: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the targets (2, y, x) float32 of Micro-Net: the weight of each pixel, then 1 in gaps, else 0.

    A gap consists of the pixels of a nucleus that touch another one. They count as background. Pixels of nuclei have
    the weight 1. Background pixels have the weight 1 + w₀·exp(-(d₁ + d₂)² / 2σ²), where d₁ and d₂ are the distances in
    pixels to the nearest two nuclei, w₀ is GAP_WEIGHT and σ is GAP_SIGMA. Nuclei whose bounding box is more than 3σ
    away along x or y are ignored there, so the weight is 1 far from nuclei.

    `instances`: (y, x) int32 ids, values up to 0 = background.
    """
    gap = np.zeros(instances.shape, bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        touching = (instances[a] != instances[b]) & (instances[a] > 0) & (instances[b] > 0)
        gap[a] |= touching
        gap[b] |= touching
    nuclei = np.where(gap, 0, instances)
    nearest = np.full((2, *instances.shape), np.inf, np.float32)
    reach = 3 * round(GAP_SIGMA)
    for number, (rows, columns) in _boxes(nuclei):
        y, x = (slice(max(0, s.start - reach), s.stop + reach) for s in (rows, columns))
        distance = distance_transform_edt(nuclei[y, x] != number).astype(np.float32)
        first, second = nearest[0, y, x], nearest[1, y, x]
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    weight = 1 + GAP_WEIGHT * np.exp(-(nearest.sum(0) ** 2) / (2 * GAP_SIGMA**2)) * (nuclei <= 0)
    return np.stack([weight, gap]).astype(np.float32)


def number_targets(instances: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the targets (2, y, x) float32 of Mask R-CNN: the number of each pixel's nucleus, 0 = none, then zeros.

    `instances`: (y, x) int32 ids up to 2²⁴, values up to 0 = background.
    """
    return np.stack([np.maximum(instances, 0), np.zeros_like(instances)]).astype(np.float32)


def _boxes(instances: NDArray[np.int32]) -> list[tuple[int, tuple[slice, slice]]]:
    """Return number and bounding box (rows, columns) of each instance."""
    found = find_objects(np.maximum(instances, 0))
    return [(number, (box[0], box[1])) for number, box in enumerate(found, start=1) if box is not None]


class DistLoss(Loss):
    """Loss of DIST: mean squared error of the distance in pixels, and cross-entropy of the classes."""

    def __call__(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the terms hv_mse and tp_ce, and `loss`, the sum to minimise (see `Loss`).

        hv_mse is left out if no pixel of the batch has annotated nuclei, tp_ce if no pixel has a class.

        `output`: the network's output (b, c, y, x) float32. `targets`: annotations, with the result of
        `distance_targets` as hv.
        """
        terms = {}
        known = targets.np != UNKNOWN
        if known.any():
            error = DISTANCE_PX * (output[:, HV] - targets.hv)[:, 0][known]
            terms["hv_mse"] = (error * error).mean()
        if (targets.tp != UNKNOWN).any():
            terms["tp_ce"] = weighted_ce(output[:, self.heads.tp], targets.tp, self.student_weights.tp)
        return terms | {"loss": self._sum(terms) + 0 * output.sum()}


class MicroNetLoss(Loss):
    """Loss of Micro-Net: weighted cross-entropy of the classes, of the output and, in training, the auxiliary ones."""

    def __call__(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the terms by name, and `loss`, the sum to minimise (see `Loss`).

        The terms are tp_ce and, if `output` has auxiliary outputs, tp_aux. On pixels whose class is not annotated, a
        nucleus may have any class.

        `output`: the network's output (b, c, y, x) float32. `targets`: annotations, with the result of `gap_targets` as
        hv.
        """
        terms = {}
        if (targets.np != UNKNOWN).any() or (targets.tp != UNKNOWN).any():
            terms["tp_ce"] = self._cross_entropy(output[:, self.heads.tp], targets)
            starts = range(self.heads.channels, output.shape[1], self.heads.n_types)
            each = [self._cross_entropy(output[:, i : i + self.heads.n_types], targets) for i in starts]
            if each:
                terms["tp_aux"] = AUXILIARY * torch.stack(each).sum()
        return terms | {"loss": self._sum(terms) + 0 * output.sum()}

    def _cross_entropy(self, logits: Tensor, targets: Targets) -> Tensor:
        log_p = logits.log_softmax(1)
        weight, gap = targets.hv.unbind(1)
        background = (gap > 0) | (targets.np == 0)
        typed = (targets.tp > 0) & ~background
        of_class = log_p.gather(1, targets.tp.clamp(min=0).unsqueeze(1)).squeeze(1)
        of_nucleus = log_p[:, 1:].logsumexp(1)
        log_likelihood = torch.where(background, log_p[:, 0], torch.where(typed, of_class, of_nucleus))
        known = (targets.np != UNKNOWN) | (targets.tp != UNKNOWN)
        return -(weight * log_likelihood)[known].sum() / weight[known].sum()


class MaskRcnnLoss(Loss):
    """Loss of Mask R-CNN: the sum of torchvision's five losses, without weights.

    Pixels that are not annotated are black, so that nothing is learnt from them. Of nuclei without a class, only the
    boxes are learnt, by the network that proposes them.
    """

    def of_batch(self, network: nn.Module, image: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Run `network` on a batch. Return torchvision's five losses by name, and their sum as `loss`.

        Everything is computed in float32.

        `network`: a `MaskRcnn`. `image`: (b, 3, y, x) float32 in [0, 1]. `targets`: annotations, with the result of
        `number_targets` as hv.
        """
        assert isinstance(network, MaskRcnn)
        annotated = (targets.np != UNKNOWN).unsqueeze(1)
        terms = network.losses(image * annotated, boxes_and_masks(targets, self.heads.n_types))
        return terms | {"loss": torch.stack(list(terms.values())).sum()}


def boxes_and_masks(targets: Targets, n_types: int) -> list[dict[str, Tensor]]:
    """Return the nuclei of each image that have at least MIN_PIXELS (10) pixels, as targets for `MaskRcnn.losses`.

    An entry has `boxes` (n, 4) float32, x0, y0, x1, y1 in pixels; `labels` (n,) int64; and `masks` (n, y, x) uint8. The
    label of a nucleus is the class of most of its pixels, or -1 if no class is annotated on them. If `n_types` is 2,
    all labels are 1.

    `targets`: annotations, with the result of `number_targets` as hv. `n_types`: number of classes, background
    included.
    """
    found = []
    for numbers, types in zip(targets.hv[:, 0].long(), targets.tp, strict=True):
        masks = numbers == torch.unique(numbers[numbers > 0])[:, None, None]
        masks = masks[masks.sum((1, 2)) >= MIN_PIXELS]
        votes = torch.stack([(masks & (types == k)).sum((1, 2)) for k in range(1, n_types)], dim=1)
        labels = torch.where(votes.any(1) | (n_types == 2), votes.argmax(1) + 1, -1)
        boxes = masks_to_boxes(masks) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
        found.append({"boxes": boxes, "labels": labels, "masks": masks.to(torch.uint8)})
    return found


@dataclass(frozen=True)
class System:
    """What a system learns, and how."""

    planes: Planes
    """Targets in the place of h and v."""
    loss: type[Loss]
    """Loss."""


SYSTEMS = {
    "hover": System(hv_targets, Loss),
    "dist": System(distance_targets, DistLoss),
    "micronet": System(gap_targets, MicroNetLoss),
    "mask-rcnn": System(number_targets, MaskRcnnLoss),
}
"""System by its name in cards."""
