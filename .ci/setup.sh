#!/usr/bin/env bash
# Makes .venv hold Baton, what it needs and what its tests need. Uses a .venv that exists; installs only if something is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
  echo "making .venv"
  "${PYTHON:-python3}" -m venv .venv
fi
if .venv/bin/python .ci/is_installed.py; then
  exit 0
fi
echo "installing Baton and what it needs into .venv; the first time this takes some minutes"
.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]' &
installing=$!
while kill -0 "$installing" 2>/dev/null; do
  printf '.'
  sleep 3
done
echo
wait "$installing"
.venv/bin/python .ci/is_installed.py
