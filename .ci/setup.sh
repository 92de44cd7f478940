#!/usr/bin/env bash
# Makes .venv hold Baton, what it needs and what its tests need. Uses a .venv that exists; installs only if something is missing.
# Where npm is, the Node packages that tests run against a cluster are installed too.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v npm >/dev/null && [ tests/node/package-lock.json -nt tests/node/node_modules ]; then
  npm ci --prefix tests/node --silent --no-audit --no-fund
fi
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
