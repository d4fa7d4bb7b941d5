"""Mask R-CNN: finds boxes of nuclei, and in each box the class and the mask of its nucleus.

Source: He et al. 2017, "Mask R-CNN" (ICCV). The network is torchvision's, with two changes for nuclei: anchors of 16 to
128 pixels, since tiles are not enlarged, and an encoder of segmentation-models-pytorch, so that encoders and their
ImageNet weights are those of the students.

A tile's nuclei are merged by score: a pixel belongs to the highest-scoring nucleus whose mask is above ½ there. The
score is the probability of a nucleus, 1 - P(background), so that a nucleus of doubtful class is not lost; of boxes that
overlap, the highest-scoring one is kept, whatever its class. In the layout of `hover_batch.model.heads`, all pixels of
a nucleus have its score and the probabilities of its classes, and h and v are their distances to the centre of its box.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FeaturePyramidNetwork, clip_boxes_to_image, nms

from hover_batch.errors import PackageError
from hover_batch.model.architectures.protocol import Architecture
from hover_batch.model.architectures.unet import StudentArch
from hover_batch.model.card import Card
from hover_batch.model.heads import CENTRE_PX, Heads

ANCHORS = (16, 32, 64, 128)
"""Side in pixels of the anchors on the maps at 1/4, 1/8, 1/16 and 1/32 of the tile's side."""
RATIOS = (0.5, 1.0, 2.0)
"""Height ÷ width of the anchors."""
PROPOSALS = 1000
"""Largest number of proposals in a tile."""
LEARNT = 128
"""Largest number of proposals in an image from which classes and masks are learnt. Crops have a tenth of the area of
the images for which the published 512 are meant."""
NUCLEI = 300
"""Largest number of nuclei in a tile; the densest tissue has about 200 in 384² pixels."""
MIN_SCORE = 0.5
"""Score that a nucleus must exceed, as in the stored foreground."""
MAX_OVERLAP = 0.5
"""IoU of boxes above which only the one with the higher score is kept."""
_BACKGROUND = -30.0
"""Logit of what is not there."""


class MaskRcnn(nn.Module):
    """Mask R-CNN with random weights.

    In evaluation mode it takes (b, 3, y, x) float RGB in [0, 1], with sides that are multiples of 32, and returns
    (b, channels, y, x) float32 in the layout of `hover_batch.model.heads`. `losses` is for training.

    `width`: a quarter of the channels of the feature pyramid, to which the layers after it are proportional; 64 in the
    published network. KeyError if the encoder of `arch` is not known.
    """

    def __init__(self, arch: StudentArch, width: int = 64) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp  # takes seconds

        channels, n = 4 * width, arch.n_types
        self.encoder = smp.encoders.get_encoder(arch.encoder, depth=5, weights=None)
        self.pyramid = FeaturePyramidNetwork(list(self.encoder.out_channels[2:]), channels)
        parts = MaskRCNN(
            SimpleNamespace(out_channels=channels),  # in the place of encoder and pyramid, which are called here
            rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in ANCHORS), (RATIOS,) * len(ANCHORS)),
            rpn_pre_nms_top_n_train=PROPOSALS,
            rpn_post_nms_top_n_train=PROPOSALS,
            rpn_pre_nms_top_n_test=PROPOSALS,
            rpn_post_nms_top_n_test=PROPOSALS,
            box_batch_size_per_image=LEARNT,
            box_head=TwoMLPHead(channels * 7 * 7, 16 * width),
            box_predictor=FastRCNNPredictor(16 * width, n),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, n),
        )
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads

    def forward(self, image: Tensor) -> Tensor:
        """Return the output for the batch `image`; `MaskRcnn` states both shapes.

        On the device meta, on which costs are counted, there are PROPOSALS proposals and NUCLEI nuclei in each image.
        """
        features = self._features(image)
        shape = image.shape[-2], image.shape[-1]
        if image.is_meta:
            return self._fullest(features, shape)
        with torch.autocast(image.device.type, enabled=False):  # bfloat16 would move boxes by pixels
            features = {name: maps.float() for name, maps in features.items()}
            proposals, _ = self.rpn(ImageList(image, [shape] * len(image)), features)
            outputs = []
            for i, boxes in enumerate(proposals):
                of_image = {name: maps[i : i + 1] for name, maps in features.items()}
                outputs.append(merged(*self._nuclei(of_image, boxes, shape), shape))
            return torch.stack(outputs)

    def losses(self, image: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return torchvision's losses by name; their sum is to be minimised.

        `image`: (b, 3, y, x) float32. `targets`: for each image, `boxes` (n, 4) float32 as x0, y0, x1, y1 in pixels;
        `labels` (n,) int64, classes from 1 on, or -1 for nuclei of which only the boxes are learnt; `masks` (n, y, x)
        uint8. The proposals to learn from are drawn by torch's generator.
        """
        features, shapes = self._features(image), [(image.shape[-2], image.shape[-1])] * len(image)
        training = self.training
        self.rpn.training = self.roi_heads.training = True  # they have losses then alone; no layer of theirs changes
        try:
            proposals, of_proposals = self.rpn(ImageList(image, shapes), features, targets)
            _, of_nuclei = self.roi_heads(features, proposals, shapes, targets)
        finally:
            self.rpn.training = self.roi_heads.training = training
        return {**of_proposals, **of_nuclei}

    def _features(self, image: Tensor) -> dict[str, Tensor]:
        """Return the maps of the pyramid by name, the largest first, at 1/4 to 1/32 of the image's side."""
        maps = self.encoder(image)[2:]
        features: dict[str, Tensor] = self.pyramid({str(i): level for i, level in enumerate(maps)})
        return features

    def _nuclei(
        self, features: dict[str, Tensor], proposals: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nuclei of one image, the highest score first, as the arguments of `merged`.

        `features`: those of the image. `proposals` (m, 4): boxes. `shape`: y, x of the image.
        """
        heads = self.roi_heads
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, [proposals], [shape])))
        log_p = logits.log_softmax(1)
        label = log_p[:, 1:].argmax(1) + 1
        boxes = heads.box_coder.decode(deltas, [proposals])[torch.arange(len(label)), label]
        boxes = clip_boxes_to_image(boxes, shape)
        score = log_p[:, 1:].logsumexp(1).exp()
        sides = boxes[:, 2:] - boxes[:, :2]
        possible = torch.nonzero((score > MIN_SCORE) & (sides.amin(1) >= 1) & (sides.amax(1) < 2 * CENTRE_PX))[:, 0]
        kept = possible[nms(boxes[possible], score[possible], MAX_OVERLAP)[:NUCLEI]]
        boxes, label = boxes[kept], label[kept]
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, [boxes], [shape])))
        return log_p[kept], boxes, masks[torch.arange(len(label)), label].sigmoid()

    def _fullest(self, features: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Do the work of a tile of PROPOSALS proposals and NUCLEI nuclei, without its values; return an output."""
        first = features["0"]
        self.rpn.head(list(features.values()))
        boxes = first.new_empty((len(first) * PROPOSALS, first.shape[1], 7, 7))
        logits, _ = self.roi_heads.box_predictor(self.roi_heads.box_head(boxes))
        masks = first.new_empty((len(first) * NUCLEI, first.shape[1], 14, 14))
        self.roi_heads.mask_predictor(self.roi_heads.mask_head(masks))
        return first.new_empty((len(first), Heads(logits.shape[1]).channels, *shape))


def merged(log_p: Tensor, boxes: Tensor, masks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Merge the nuclei of an image. Return the output (channels, y, x) float32 of the network.

    Each pixel belongs to the first nucleus, in the order of the arguments, whose mask is above ½ there.

    `log_p` (n, classes): logarithms of the probabilities of the classes, background first. `boxes` (n, 4): x0, y0, x1,
    y1 in pixels. `masks` (n, side, side): probabilities of the nucleus in its box. `shape`: y, x of the image.
    """
    pasted = paste_masks_in_image(masks.unsqueeze(1), boxes, shape)[:, 0] > 0.5
    # The background comes last, and has every pixel; argmax returns the first.
    present = torch.cat([pasted, pasted.new_ones((1, *shape))])
    owner = present.byte().argmax(0)
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2).floor()
    nucleus = log_p[:, 1:].logsumexp(1, keepdim=True)
    of_nuclei = torch.cat([log_p[:, :1], nucleus, centre, log_p], dim=1)
    of_background = of_nuclei.new_full((1, of_nuclei.shape[1]), _BACKGROUND)
    of_background[:, [0, Heads(log_p.shape[1]).tp.start]] = 0
    output = torch.cat([of_nuclei, of_background])[owner].permute(2, 0, 1)
    y, x = (torch.arange(side, device=boxes.device) for side in shape)
    inside = owner < len(boxes)
    output[2] = (output[2] - x) / CENTRE_PX * inside
    output[3] = (output[3] - y[:, None]) / CENTRE_PX * inside
    return output


class MaskRcnnArchitecture(Architecture):
    """Mask R-CNN."""

    name = "mask-rcnn"
    system = "mask-rcnn"
    tile = (384, 256)
    batch = 2

    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return a Mask R-CNN with the encoder and classes of `card`, and the width of `tensors` (64 without tensors).

        PackageError if `tile_in` is not a multiple of 32; KeyError if the encoder is not known, or the tensors are not
        those of a Mask R-CNN.
        """
        if card.tile_in % 32:
            raise PackageError(f"package {card.name}: tile_in is {card.tile_in}; that of mask-rcnn is a multiple of 32")
        width = 64 if tensors is None else len(tensors["rpn.head.cls_logits.weight"][0]) // 4
        return self.untrained(len(card.taxonomy.classes), encoder=card.encoder, width=width)

    def untrained(self, n_types: int, *, encoder: str, width: int) -> nn.Module:
        """Return a Mask R-CNN with random weights.

        `n_types`: number of classes, background included. `encoder`: its name in segmentation-models-pytorch. `width`:
        scale of the heads (see `MaskRcnn`). KeyError or another error of segmentation-models-pytorch if the encoder is
        not known or does not fit.
        """
        return MaskRcnn(StudentArch(encoder, n_types), width)


ARCHITECTURES = (MaskRcnnArchitecture(),)
