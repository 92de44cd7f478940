#!/usr/bin/env bash
# Starts a Ray cluster host by host, and Baton in it. Baton is installed on every host, and the checkpoint lies at the
# same path on all of them.
#
#   launch.sh head [RAY START OPTIONS]                    on the first host: Ray's head, and the place of the router
#   launch.sh join HEAD_IP ROLE [RAY START OPTIONS]       on every other host; ROLE is prefill, decode, both, or router
#   launch.sh serve --model DIR [BATON SERVE OPTIONS]     on the first host, or a router's: Baton, until SIGTERM
#   launch.sh stop                                        on any host: what the first two have started there
#
# Environment:
#   NODE_IP        the address by which other hosts reach this one, where Ray does not find it out
#   RAY_PORT       port of Ray's head (6379)
#   BATON_CONFIG   configuration of `serve` (baton.yaml beside this script)
#   RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token
#                  the token of the cluster: `head` makes one where there is none, and every other host needs the same
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
port=${RAY_PORT:-6379}
# Workers are servers here: as Ray has it everything else on a host would go before them.
export RAY_worker_niceness=${RAY_worker_niceness:-0}
# KV never goes through Ray's object store, and the router has a page of its own.
options=(--object-store-memory=100000000 --disable-usage-stats)
if [ -n "${NODE_IP:-}" ]; then
  options+=(--node-ip-address="$NODE_IP")
fi

fail() {
  echo "launch.sh: $1" >&2
  exit 2
}

have_token() {
  [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]
}

# Without a token whoever reaches Ray's port can run code on every host. `ray start --address` does not ask for the
# token by itself, even where there is one.
use_token() {
  if [ "${RAY_AUTH_MODE:-token}" = token ]; then
    have_token || fail "no token of the cluster; copy ~/.ray/auth_token from the head, or set RAY_AUTH_MODE=disabled if it has none"
    export RAY_AUTH_MODE=token
  fi
}

case "${1:-}" in
  head)
    shift
    if [ "${RAY_AUTH_MODE:-token}" = token ] && ! have_token; then
      ray get-auth-token --generate >/dev/null
      echo "launch.sh: made ~/.ray/auth_token; copy it to every host" >&2
    fi
    use_token
    exec ray start --head --port="$port" --include-dashboard=false --labels=baton-role=router "${options[@]}" "$@"
    ;;
  join)
    [ $# -ge 3 ] || fail "usage: launch.sh join HEAD_IP prefill|decode|both|router [RAY START OPTIONS]"
    head=$2 role=$3
    shift 3
    case "$role" in prefill | decode | both | router) ;; *) fail "ROLE is prefill, decode, both or router, not $role" ;; esac
    use_token
    exec ray start --address="$head:$port" --labels="baton-role=$role" "${options[@]}" "$@"
    ;;
  serve)
    shift
    use_token
    # That of an image is for a container by itself.
    if [ "${BATON_CONFIG:-}" = "$here/image.yaml" ]; then
      BATON_CONFIG=
    fi
    export BATON_CONFIG=${BATON_CONFIG:-$here/baton.yaml}
    exec baton serve --ray-address auto "$@"
    ;;
  stop)
    exec ray stop
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
