#!/usr/bin/env bash
# Table 3 of the In-Place ABN paper: sixteen trainings, each of which took four cards. What they should give stands in
# configs/experiment/RECIPE.yaml, and beside what was measured at the end, or at any time by `segtrain runs table=paper`.
#   SEGTRAIN_DATA=/data ./scripts/reproduce/table3.sh [RECIPE ...] [key=value ...] [--smoke]
# Needs cityscapes/ and cocostuff/ below SEGTRAIN_DATA (datasets/README.md), and the published ImageNet files in weights/.
# Run again, it goes on where it stopped. The arguments are explained in common.sh.
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
if [ -n "$smoke" ] && [ ${#only[@]} -eq 0 ]; then # one small network stands in for both: half of the rows are the same
  for row in "${rows[@]}"; do [[ $row == *_wider_resnet38_* ]] || only+=("$row"); done
fi
begin cityscapes cocostuff
for row in "${rows[@]}"; do train "$row"; done
finish
