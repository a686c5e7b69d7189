# Sourced by scripts/quickstart and scripts/test: installs segtrain into a virtual environment.
#   PYTHON   interpreter of the environment (default: the newest suitable of python3.13 to python3.10, or python3)
#   VENV     folder of the environment (default: .venv in the checkout)
# An active environment is not touched. Sets BIN, the folder of the installed programs.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER
export PIP_DISABLE_PIP_VERSION_CHECK=1

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" && { echo "$PYTHON"; return; }
    echo "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || true); segtrain needs Python 3.10 to 3.13 with its venv module." >&2
  else
    for candidate in python3.13 python3.12 python3.11 python3.10 python3 python; do
      if command -v "$candidate" >/dev/null && fits "$candidate"; then echo "$candidate"; return; fi
    done
    echo "No Python 3.10 to 3.13 with its venv module found (python3 is $(python3 --version 2>&1 || true))." >&2
  fi
  echo "Install one (Debian or Ubuntu: apt install python3.12 python3.12-venv; elsewhere: https://www.python.org/downloads/)" >&2
  echo "and run PYTHON=/path/to/python3.12 $0" >&2
  return 2
}

# install EXTRAS: "" or "[dev]". Does nothing if the same files have been installed before.
install() {
  local python stamp wanted
  stamp=$VENV/.segtrain$1
  if [ ! -x "$VENV/bin/python" ]; then
    python=$(find_python) || exit 2
    echo "creating $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
  elif ! fits "$VENV/bin/python"; then
    echo "$VENV has $("$VENV/bin/python" --version 2>&1); segtrain needs 3.10 to 3.13: remove it, or choose another folder with VENV=" >&2
    exit 2
  fi
  wanted=$(cd "$ROOT" && cat pyproject.toml constraints.txt && pwd)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "installed already in $VENV"
  else
    echo "installing into $VENV: about 3 GB to download, 6 GB on disk, most of it torch with CUDA"
    "$VENV/bin/python" -m pip install --quiet --progress-bar off -c "$ROOT/constraints.txt" -e "$ROOT$1"
    printf '%s\n' "$wanted" > "$stamp"
  fi
  BIN=$VENV/bin
}
