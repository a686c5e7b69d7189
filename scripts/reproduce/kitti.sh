#!/usr/bin/env bash
# From ImageNet over Mapillary Vistas to Cityscapes + KITTI, and the archive for KITTI's server.
#   SEGTRAIN_DATA=/data ./scripts/reproduce/kitti.sh [key=value ...] [--smoke]
# Needs vistas/ (v1.2), cityscapes/ and kitti/ below SEGTRAIN_DATA (datasets/README.md), and in weights/ the published
# ImageNet file of WideResNet-38. Run again, it goes on where it stopped. The arguments are explained in common.sh.
# What figure to expect nobody can say: 69.56 % class IoU was an ensemble of five models whose data mix is unpublished.
# 72.83 % is of NVIDIA's single-model recipe on the same backbone: segtrain train experiment=kitti_wider_resnet38_nvidia.
# All 200 KITTI pictures are trained on here, so that a score on them means nothing; without dataset.parts.kitti.split
# the second recipe holds some out.
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
