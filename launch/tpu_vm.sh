#!/usr/bin/env bash
# A run on Cloud TPU VMs, from nothing to nothing: create or queue a slice, install, run on all its hosts, watch, delete.
#
#   launch/tpu_vm.sh up     NAME --type v5e-16 --zone us-west4-a --spot -- train --config world --workdir gs://bucket/run
#   launch/tpu_vm.sh create NAME --type v5p-128 --zone us-east5-a [--spot] [--queue]
#   launch/tpu_vm.sh install NAME --zone us-east5-a            # this checkout, as a wheel, on every host
#   launch/tpu_vm.sh start  NAME --zone us-east5-a -- train --config world --workdir gs://bucket/run
#   launch/tpu_vm.sh watch  NAME --type v5p-128 --zone us-east5-a -- train ...   # until it is done; re-creates the slice
#   launch/tpu_vm.sh logs | status | stop | delete NAME --zone us-east5-a
#
# `up` is create, install, start and watch. What stands after -- goes to `sora-jax` on every host; `train` finds the other
# hosts by itself. A slice that is preempted or lost is deleted and made again, and the run goes on from its newest
# checkpoint: give it a workdir in a bucket.
#
#   --type TYPE      v4-32, v5e-16, v5p-128, v6e-64, ... as the product is called
#   --zone ZONE      where; --project PROJECT: gcloud's own, if not said
#   --spot           cheaper, and may be taken away
#   --queue          wait in line for the slice (queued resources) in place of failing when there is none
#   --runtime NAME   of the TPU software; the type's own, if not said
#   --every SECONDS  between two looks of `watch` (60)
#   --dry-run        print the commands, run none
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

fail() {
  printf 'tpu_vm.sh: %s (see --help)\n' "$1" >&2
  exit 2
}

say() { printf 'tpu_vm.sh: %s\n' "$1" >&2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=3.11
home=sora-jax # on the hosts: the environment, the wheel, the log and how the run ended

# ------------------------------------------------------------------------------------------------------------ arguments

action=${1:-}
case $action in
  --help | -h | help) usage && exit 0 ;;
  up | create | install | start | watch | logs | status | stop | delete) shift ;;
  '') fail "say what to do: up, create, install, start, watch, logs, status, stop or delete" ;;
  *) fail "unknown action $action" ;;
esac
name='' type='' zone='' project='' runtime='' spot=0 queue=0 every=60 dry_run=0
command=()
needs() { [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"; }
while [ $# -gt 0 ]; do
  case $1 in
    --type) needs "$@" && type=$2 && shift 2 ;;
    --zone) needs "$@" && zone=$2 && shift 2 ;;
    --project) needs "$@" && project=$2 && shift 2 ;;
    --runtime) needs "$@" && runtime=$2 && shift 2 ;;
    --every) needs "$@" && every=$2 && shift 2 ;;
    --spot) spot=1 && shift ;;
    --queue) queue=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help | -h) usage && exit 0 ;;
    --) shift && command=("$@") && break ;;
    -*) fail "unknown flag $1" ;;
    *) [ -z "$name" ] || fail "one name, not $name and $1; the command for the hosts stands after --" && name=$1 && shift ;;
  esac
done
[ -n "$name" ] || fail "give the slice a name"
[ -n "$zone" ] || fail "give a --zone"
[[ $every =~ ^[0-9]+$ ]] || fail "--every $every is not a number of seconds"
case $action in
  up | create | watch) [ -n "$type" ] || fail "give a --type, say v5e-16" ;;
esac
case $action in
  up | start | watch)
    [ ${#command[@]} -gt 0 ] || fail "say after -- what sora-jax shall do, say: -- train --config world --workdir gs://bucket/run"
    ;;
esac

accelerator='' # what gcloud calls the type
case $type in
  '') ;;
  v4-*) accelerator=$type default_runtime=tpu-ubuntu2204-base ;;
  v5e-*) accelerator=v5litepod-${type#v5e-} default_runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) accelerator=$type default_runtime=v2-alpha-tpuv5 ;;
  v6e-*) accelerator=$type default_runtime=v2-alpha-tpuv6e ;;
  tpu7x-* | v7x-*) fail "$type is had on Kubernetes: launch/gke" ;;
  *) fail "unknown type $type; known: v4-N, v5e-N, v5p-N, v6e-N" ;;
esac
[[ -z $type || $type =~ -[1-9][0-9]*$ ]] || fail "$type does not end in a number of cores or chips"
runtime=${runtime:-${default_runtime:-}}

# -------------------------------------------------------------------------------------------------------------- actions

run() { # runs it, or prints it
  if [ "$dry_run" = 1 ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

where=(--zone "$zone" ${project:+--project "$project"})
tpus=(gcloud compute tpus)

on_all_hosts() { run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker all --command "$1"; }
on_first_host() { run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker 0 --command "$1"; }

create() {
  local sort=()
  [ "$spot" = 0 ] || sort=(--spot)
  if [ "$queue" = 0 ]; then
    run "${tpus[@]}" tpu-vm create "$name" "${where[@]}" --accelerator-type "$accelerator" --version "$runtime" \
      "${sort[@]+"${sort[@]}"}"
    return
  fi
  run "${tpus[@]}" queued-resources create "$name" "${where[@]}" --node-id "$name" \
    --accelerator-type "$accelerator" --runtime-version "$runtime" "${sort[@]+"${sort[@]}"}" || return 1
  [ "$dry_run" = 0 ] || return 0
  until [ "$(state)" = READY ]; do
    say "$name waits in line; looking again in $every s"
    sleep "$every"
  done
}

delete() {
  [ "$queue" = 0 ] || run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
  [ "$queue" = 1 ] || run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
}

state() { # READY, CREATING, PREEMPTED, ...; MISSING where there is none
  "${tpus[@]}" tpu-vm describe "$name" "${where[@]}" --format 'value(state)' 2>/dev/null || echo MISSING
}

install() { # the hosts come with an older Python: uv brings the right one
  local wheels=WHEELS wheel=sora_jax.whl
  [ "$dry_run" = 1 ] || wheels=$(mktemp -d)
  run python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$root" || return 1
  [ "$dry_run" = 1 ] || wheel=$(cd "$wheels" && ls -- *.whl) || return 1
  on_all_hosts "mkdir -p $home && rm -f $home/*.whl" || return 1
  run "${tpus[@]}" tpu-vm scp "$wheels/$wheel" "$name:$home/" "${where[@]}" --worker all || return 1
  [ "$dry_run" = 1 ] || rm -rf "$wheels"
  on_all_hosts "cd $home && python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing \
--python $python env && python3 -m uv pip install --quiet --python env/bin/python '${wheel}[tpu,gcs]'"
}

start() { # in a session of its own on every host, where it outlives this connection; how it ended is left in a file
  local words
  words=$(printf '%q ' env/bin/sora-jax "${command[@]}")
  # What is left of an earlier attempt goes first, and the lock on the chips that a killed process leaves. The shell
  # takes SIGTERM without dying of it, so that it can say how the program ended.
  on_all_hosts "cd $home && { [ ! -f session ] || pkill -KILL -s \$(cat session); rm -f ended /tmp/libtpu_lockfile; } && \
(setsid sh -c $(printf '%q' "trap : TERM; echo \$\$ > session; $words> log 2>&1; echo \$? > ended") \
</dev/null >/dev/null 2>&1 &)"
}

stop() { # it saves, and ends
  on_all_hosts "cd $home && [ -f session ] && pkill -TERM -s \$(cat session) || true"
}

ended() { # the first host's exit code, empty while the run is under way
  "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker 0 --command "cat $home/ended 2>/dev/null || true" 2>/dev/null
}

watch() { # until the run ends well or is the user's to mend; whatever takes the slice away, it is made again
  if [ "$dry_run" = 1 ]; then
    run "${tpus[@]}" tpu-vm describe "$name" "${where[@]}" --format 'value(state)'
    return
  fi
  local found code
  while true; do
    found=$(state)
    case $found in
      READY)
        code=$(ended | tr -dc 0-9) || code=''
        case $code in
          '') ;;
          0) say "the run is done; \`launch/tpu_vm.sh delete $name --zone $zone\` ends what it costs" && return ;;
          2) say "the run was refused: \`launch/tpu_vm.sh logs $name --zone $zone\` says why" && return 2 ;;
          *) say "the run ended with exit code $code; starting it again" && start ;;
        esac
        ;;
      CREATING | STARTING | RESTARTING | REPAIRING) say "$name is $found" ;;
      *)
        say "$name is $found; making it again"
        [ "$found" = MISSING ] || delete || true
        if create && install; then start; else say "that failed; trying again in $every s"; fi
        ;;
    esac
    sleep "$every"
  done
}

case $action in
  up)
    create
    install
    start
    watch
    ;;
  create) create ;;
  install) install ;;
  start) start ;;
  watch) watch ;;
  logs) on_first_host "tail -n 100 -f $home/log" ;;
  status) run "${tpus[@]}" tpu-vm describe "$name" "${where[@]}" && on_all_hosts "tail -n 2 $home/log" ;;
  stop) stop ;;
  delete) delete ;;
esac
