#!/usr/bin/env bash
# Generates baton/**/*_pb2*.py and .pyi from proto/. With --check, fails when what is committed differs.
# The generator has an environment of its own: the oldest grpcio-tools that Baton supports, so that the code loads on any newer runtime.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=build/proto-venv
if [ ! -x "$tools/bin/protoc-gen-mypy" ]; then
  python3 -m venv "$tools"
  "$tools/bin/pip" install -q grpcio-tools==1.74.0 "setuptools<81" mypy-protobuf==3.7.0
fi
out=.
if [ "${1:-}" = --check ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
mapfile -t protos < <(cd proto && find . -name '*.proto' | sed 's|^\./||' | sort)
PATH="$tools/bin:$PATH" "$tools/bin/python" -m grpc_tools.protoc -Iproto \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" "${protos[@]}"
if [ "$out" != . ]; then
  status=0
  while read -r generated; do
    cmp -s "$out/$generated" "$generated" || { echo "$generated differs from what proto/ generates; run make proto" >&2; status=1; }
  done < <(cd "$out" && find . -type f)
  exit $status
fi
