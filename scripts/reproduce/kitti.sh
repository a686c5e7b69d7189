#!/usr/bin/env bash
# Train on Mapillary Vistas from ImageNet weights, then on Cityscapes + KITTI; write the archive for KITTI's server.
#   SEGTRAIN_DATA=/data ./scripts/reproduce/kitti.sh [key=value ...] [--smoke]
# Needs vistas/ (v1.2), cityscapes/ and kitti/ below SEGTRAIN_DATA (datasets/README.md), and in weights/ the published
# ImageNet weights of WideResNet-38. The same command continues where it stopped. common.sh explains the arguments.
# There is no figure to expect: 69.56 % class IoU was an ensemble of five models whose data mix is unpublished. 72.83 %
# is of NVIDIA's single-model recipe on the same backbone: segtrain train experiment=kitti_wider_resnet38_nvidia.
# Training uses all 200 KITTI images here, so a score on them means nothing; without dataset.parts.kitti.split the
# second recipe holds some out.
rows=(vistas_wider_resnet38 cityscapes_kitti_wider_resnet38)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin vistas cityscapes kitti
train vistas_wider_resnet38
train cityscapes_kitti_wider_resnet38 dataset.parts.kitti.split=trainval ${smoke:+trainer.max_steps=36}
if asked cityscapes_kitti_wider_resnet38; then
  run "$BIN/segtrain" submit run=runs/cityscapes_kitti_wider_resnet38 dataset=kitti output=segtrain-out/kitti "${answers[@]}"
fi
if [ -n "$smoke" ]; then
  run "$BIN/python" "$ROOT/scripts/reproduce/smoke.py" archive segtrain-out/kitti/kitti-test.zip semantic \
    datasets/kitti/testing/image_2
fi
finish
