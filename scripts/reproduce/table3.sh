#!/usr/bin/env bash
# Table 3 of the In-Place ABN paper: sixteen trainings, each on four GPUs. The published figures are in
# configs/experiment/RECIPE.yaml; `segtrain runs table=paper` prints them beside what was measured.
#   SEGTRAIN_DATA=/data ./scripts/reproduce/table3.sh [RECIPE ...] [key=value ...] [--smoke]
# Needs cityscapes/ and cocostuff/ below SEGTRAIN_DATA (datasets/README.md), and the published ImageNet files in weights/.
# The same command continues where it stopped. common.sh explains the arguments.
rows=(
  cityscapes_resnext101_std_16x512     cityscapes_wider_resnet38_std_20x512
  cityscapes_resnext101_inplace_28x512 cityscapes_wider_resnet38_inplace_28x512
  cityscapes_resnext101_inplace_16x672 cityscapes_wider_resnet38_inplace_20x640
  cityscapes_resnext101_sync_16x672    cityscapes_wider_resnet38_sync_20x640
  cocostuff_resnext101_std_16x480      cocostuff_wider_resnet38_std_20x496
  cocostuff_resnext101_inplace_24x480  cocostuff_wider_resnet38_inplace_28x496
  cocostuff_resnext101_inplace_16x600  cocostuff_wider_resnet38_inplace_20x576
  cocostuff_resnext101_sync_16x600     cocostuff_wider_resnet38_sync_20x576
)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ -n "$smoke" ] && [ ${#only[@]} -eq 0 ]; then # one small network replaces both: half of the rows are the same
  for row in "${rows[@]}"; do [[ $row == *_wider_resnet38_* ]] || only+=("$row"); done
fi
begin cityscapes cocostuff
for row in "${rows[@]}"; do train "$row"; done
finish
