#!/usr/bin/env bash
# Table 1 of the In-Place ABN paper: what exchanging ReLU and LeakyReLU after the training does. Two networks, each tested
# with both activations in the three published ways.
#   SEGTRAIN_DATA=/data ./scripts/reproduce/table1.sh [RECIPE ...] [key=value ...] [--smoke]
# Needs imagenet/ below SEGTRAIN_DATA (datasets/README.md). Run again, it goes on where it stopped. The arguments are
# explained in common.sh.
rows=(imagenet_resnext101_std_relu imagenet_resnext101_std)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin imagenet
for row in "${rows[@]}"; do
  train "$row"
  for way in center224 tencrop center320; do
    for activation in relu leaky_relu; do named "$row" inference="$way" activation="$activation"; done
  done
done
finish
