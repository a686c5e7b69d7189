#!/usr/bin/env bash
# Table 4 of the In-Place ABN paper, its tuned settings: five trainings on Cityscapes and one on Mapillary Vistas.
#   SEGTRAIN_DATA=/data ./scripts/reproduce/table4.sh [RECIPE ...] [key=value ...] [--smoke]
# Needs cityscapes/ and vistas/ (v1.2) below SEGTRAIN_DATA (datasets/README.md), and the published ImageNet files in
# weights/. The same command continues where it stopped. common.sh explains the arguments.
rows=(
  cityscapes_resnext152_sync_12x680
  cityscapes_wider_resnet38_inplace_16x712
  cityscapes_wider_resnet38_sync_16x712
  cityscapes_wider_resnet38_sync_12x872
  cityscapes_wider_resnet38_sync_class_uniform_12x872
  vistas_wider_resnet38_sync_class_uniform_12x776
)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin cityscapes vistas
for row in "${rows[@]}"; do train "$row"; done
finish
