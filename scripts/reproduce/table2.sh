#!/usr/bin/env bash
# Table 2 of the In-Place ABN paper, and the networks that the official README adds: nine networks trained on
# ImageNet-1k for 90 epochs, each evaluated by the three published protocols. model.weights= takes the resulting
# runs/RECIPE/last.pt.
#   SEGTRAIN_DATA=/data ./scripts/reproduce/table2.sh [RECIPE ...] [key=value ...] [--smoke]
# Needs imagenet/ below SEGTRAIN_DATA (datasets/README.md). The same command continues where it stopped.
# common.sh explains the arguments.
rows=(
  imagenet_resnext101_std imagenet_resnext101 imagenet_resnext101_sync imagenet_resnext152 imagenet_wider_resnet38
  imagenet_densenet264 imagenet_resnet34_sync imagenet_resnet50_sync imagenet_resnet101_sync
)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ -n "$smoke" ] && [ ${#only[@]} -eq 0 ]; then # with one small network in one process, the other rows are the same
  only=(imagenet_resnext101_std imagenet_resnext101_sync imagenet_wider_resnet38)
fi
begin imagenet
for row in "${rows[@]}"; do
  train "$row"
  for way in center224 tencrop center320; do named "$row" inference="$way"; done
done
finish
