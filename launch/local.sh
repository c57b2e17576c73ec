#!/usr/bin/env bash
# N processes of one run on this machine: to try a command of several hosts before it costs anything.
#
#   launch/local.sh 2 sora-jax train --config world --workdir runs/two
#   launch/local.sh --devices 4 2 sora-jax train ...      # 4 CPU devices in each process
#   launch/local.sh --dry-run 2 sora-jax train ...        # only say what would run
#
# What a process prints goes to this terminal, the first one's as it is, the others' with their number before each line.
# A signal goes to all of them; when one fails the others are stopped, and its exit code is this script's.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

fail() {
  printf 'local.sh: %s (see --help)\n' "$1" >&2
  exit 2
}

dry_run=0 devices='' port=''
needs() { [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a number"; }
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry-run) dry_run=1 && shift ;;
    --devices) needs "$@" && devices=$2 && shift 2 ;;
    --port) needs "$@" && port=$2 && shift 2 ;;
    -*) fail "unknown flag $1" ;;
    *) break ;;
  esac
done
[ $# -ge 2 ] || fail "give a number of processes and a command"
count=$1 && shift
for number in "$count" ${devices:+"$devices"} ${port:+"$port"}; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number is not a number"
done

[ -z "$port" ] || [ "${#port}" -le 5 ] && [ "${port:-0}" -le 65535 ] || fail "$port is no port: they end at 65535"

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

environment_of() { # environment_of PROCESS: what tells it which one it is
  printf '%s\n' "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1"
  if [ -n "$devices" ]; then printf '%s\n' JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices"; fi
}

if [ "$dry_run" = 1 ]; then
  port=${port:-PORT}
  for ((process = 0; process < count; process++)); do
    mapfile -t environment < <(environment_of "$process")
    printf '%s' "${environment[*]}"
    printf ' %q' "$@"
    printf '\n'
  done
  exit 0
fi

port=${port:-$(free_port)}
marked() { # lines with the number of their process; each is one write, so that no other comes in between
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

children=()
forward() { # a signal to every process, once each
  local child
  for child in "${children[@]}"; do kill "-$1" "$child" 2>/dev/null || true; done
}
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((process = 0; process < count; process++)); do
  mapfile -t environment < <(environment_of "$process")
  if [ "$process" = 0 ]; then
    env "${environment[@]}" "$@" &
  else
    env "${environment[@]}" "$@" > >(marked "$process") 2> >(marked "$process" >&2) &
  fi
  children+=($!)
done

# `wait` comes back early when a signal arrives, so each child is asked until it is gone.
code=0
pending=("${children[@]}")
while [ ${#pending[@]} -gt 0 ]; do
  status=0
  wait -n "${pending[@]}" 2>/dev/null || status=$?
  alive=()
  for child in "${pending[@]}"; do
    if kill -0 "$child" 2>/dev/null; then
      alive+=("$child")
    else
      status=0
      wait "$child" 2>/dev/null || status=$?
      if [ "$status" != 0 ] && [ "$code" = 0 ]; then
        code=$status
        forward TERM
      fi
    fi
  done
  pending=(${alive[@]+"${alive[@]}"})
done
exit "$code"
