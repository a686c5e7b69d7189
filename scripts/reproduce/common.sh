# Sourced by the other scripts of this folder. Their arguments:
#   RECIPE ...   only these rows (default: all)
#   key=value    further options of every training
#   --smoke      the same commands at toy size, on generated data and the CPU: tests the scripts, not the accuracy
# CARDS= is the number of processes, one for each GPU (default 4, as in the paper); VENV= and PYTHON= as in
# scripts/quickstart.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

only=() more=() answers=() smoke=
for word in "$@"; do
  case $word in
    --smoke) smoke=1 ;;
    -*) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; [ "$word" = --help ] && exit 0; exit 2 ;;
    *=*) more+=("$word") ;;
    *) only+=("$word") ;;
  esac
done
for word in "${only[@]}"; do
  if [[ " ${rows[*]} " != *" $word "* ]]; then echo "no row $word; there is ${rows[*]}" >&2; exit 2; fi
done
install ""
trained=() number=0

run() { echo "+ $*"; "$@"; }

# asked RECIPE: whether this row was selected.
asked() { [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $1 "* ]]; }

# train RECIPE [key=value ...]: train into runs/RECIPE. The same command resumes, or reports that the run is finished.
train() {
  local recipe=$1 program=("$BIN/torchrun" --standalone --nproc-per-node="$CARDS" -m segtrain)
  shift
  number=$((number + 1))
  asked "$recipe" || return 0
  if [ "$CARDS" = 1 ]; then program=("$BIN/segtrain"); fi
  echo; echo "[$number of ${#rows[@]}] $recipe"
  run "${program[@]}" train experiment="$recipe" name="$recipe" "${toy[@]}" "$@" "${more[@]}"
  trained+=("runs/$recipe")
}

# named RECIPE key=value ...: evaluate an image classifier by one protocol.
named() {
  local recipe=$1
  shift
  asked "$recipe" || return 0
  run "$BIN/segtrain" evaluate run="runs/$recipe" "$@" "${answers[@]}"
}

# weights_of RECIPE: the weights that it starts from; ImageNet recipes start from random weights.
weights_of() {
  local file=$ROOT/configs/experiment/$1.yaml found
  found=$(sed -n 's/^  weights: //p' "$file")
  if [ -z "$found" ] && [[ $1 != imagenet_* ]]; then found=$(weights_of "$(sed -n 's/^  - \([a-z0-9_]*\)$/\1/p' "$file")"); fi
  echo "$found"
}

# begin DATASET ...: check before the first row, which takes days, that all published weights and runs exist from which
# the rows start. A run may be missing if its own row is selected too. --smoke makes weights of the same names, and
# street scenes in the layouts of the datasets.
begin() {
  local row file run missing=() data
  for row in "${rows[@]}"; do
    file=$(weights_of "$row")
    run=${file#runs/} run=${run%/last.pt}
    if asked "$row" && [[ $file == runs/* && ! -f $file && " ${more[*]} " != *" model.weights="* ]] && ! asked "$run"; then
      echo "not in $PWD: $file, with which $row begins; train it first: the same script without naming rows, or with $run" >&2
      exit 2
    fi
    if asked "$row" && [[ $file == weights/* && " ${missing[*]} " != *" $file "* && ! -f $file ]]; then
      missing+=("$file")
    fi
  done
  if [ -n "$smoke" ]; then
    for data in "$@"; do scenes "$data"; done
    if [ ${#missing[@]} -gt 0 ]; then
      run "$BIN/python" "$ROOT/scripts/reproduce/smoke.py" weights "$BACKBONE" "${missing[@]}"
    fi
  elif [ ${#missing[@]} -gt 0 ] && [[ " ${more[*]} " != *" model.weights="* ]]; then
    printf 'not in %s: %s\n' "$PWD" "${missing[*]}" >&2
    echo "\`segtrain weights\` prints where to get each; model.weights=none starts from random weights" >&2
    exit 2
  fi
}

# finish: print what was measured beside what was published.
finish() {
  [ -z "$smoke" ] || run "$BIN/python" "$ROOT/scripts/reproduce/smoke.py" runs "${trained[@]}"
  run "$BIN/segtrain" runs table=paper
  [ -z "$smoke" ] || { cd "$ROOT"; rm -rf "$work"; echo "the smoke test passed"; }
}

# ------------------------------------------------------------------------------------------------ --smoke

# scenes LAYOUT: four street scenes for training, few enough to overfit, and two for validation, in the layout of the
# real dataset.
scenes() {
  local split lists=datasets/cocostuff/annotations/deprecated-challenge2017
  run "$BIN/segtrain" streets output="datasets/$1" layout="$1" scenes=4 val_scenes=2 night_scenes=0
  if [ "$1" = cocostuff ]; then # the lists of the 2017 challenge, which are in a separate archive of COCO
    mkdir -p "$lists"
    for split in train val; do (cd "datasets/cocostuff/images/${split}2017" && ls) > "$lists/$split-ids.txt"; done
  fi
}

toy=()
if [ -n "$smoke" ]; then
  work=$(mktemp -d)
  echo "in $work, which is left there if something fails"
  cd "$work"
  unset SEGTRAIN_DATA
  CARDS=${CARDS:-1}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # at this size, more threads are slower
  # The paper's networks are too large for two cores and a few minutes: a ResNet-18 replaces them.
  BACKBONE=${BACKBONE:-resnet18}
  answers=(device=cpu 'inference.scales=[0.5]')
  toy=( # full scenes at a quarter of their size
    "${answers[@]}" model.backbone="$BACKBONE" model.head_channels=64 'augmentation.crop_size=[64,128]'
    'augmentation.scale=[0.25,0.25]' augmentation.flip=0 trainer.batch_size=4 trainer.max_steps=12 optimizer.lr=0.05
    loader.workers=0 logging.every=2 logging.pictures=0
  )
  if [[ ${rows[0]} == imagenet_* ]]; then # each image shows one thing of the street scenes
    answers=(device=cpu loader.workers=0) # the three published protocols, at their sizes
    toy=(
      "${answers[@]}" inference.resize=64 inference.crop=64 model.backbone="$BACKBONE" 'augmentation.crop_size=[64,64]' 'augmentation.area=[0.6,1.0]'
      augmentation.color=0 trainer.batch_size=10 trainer.max_steps=36 optimizer.lr=0.01 logging.every=2
      logging.pictures=0
    )
  fi
else
  CARDS=${CARDS:-4}
  cd "$ROOT"
fi
