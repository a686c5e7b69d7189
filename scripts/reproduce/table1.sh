#!/usr/bin/env bash
# Table 1 of the In-Place ABN paper: ReLU and LeakyReLU exchanged after training. Two networks, each evaluated with both
# activations by the three published protocols.
#   SEGTRAIN_DATA=/data ./scripts/reproduce/table1.sh [RECIPE ...] [key=value ...] [--smoke]
# Needs imagenet/ below SEGTRAIN_DATA (datasets/README.md). The same command continues where it stopped.
# common.sh explains the arguments.
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
