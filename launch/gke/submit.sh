#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster (with JobSet installed, and node pools of that type and topology).
#
#   launch/gke/submit.sh --name wan --image IMAGE --type tpu7x --topology 4x4x4 -- train --config wan_14b --workdir gs://bucket/run
#   launch/gke/submit.sh --name wan --image IMAGE --type v6e --topology 16x16 --slices 2 -- train ...
#
#   --type       v5e, v5p, v6e or tpu7x
#   --topology   chips of a slice: 4x4 or 4x4x4
#   --slices N   slices that train one model together (1)
#   --dry-run    print the manifest; --server-dry-run: have the cluster check it, and start nothing
#
# Then: kubectl get jobset NAME; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME; kubectl delete jobset NAME
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

fail() {
  printf 'submit.sh: %s (see --help)\n' "$1" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name='' image='' type='' topology='' slices=1 mode=apply
command=()
needs() { [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"; }
while [ $# -gt 0 ]; do
  case $1 in
    --name) needs "$@" && name=$2 && shift 2 ;;
    --image) needs "$@" && image=$2 && shift 2 ;;
    --type) needs "$@" && type=$2 && shift 2 ;;
    --topology) needs "$@" && topology=$2 && shift 2 ;;
    --slices) needs "$@" && slices=$2 && shift 2 ;;
    --dry-run) mode=print && shift ;;
    --server-dry-run) mode=server && shift ;;
    --help | -h) usage && exit 0 ;;
    --) shift && command=("$@") && break ;;
    *) fail "unknown argument $1; the command stands after --" ;;
  esac
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "give a --name of small letters, digits and -"
[ -n "$image" ] || fail "give an --image, as launch/Dockerfile builds it"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices is not a number"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "give a --topology, say 4x4 or 4x4x4"
[ ${#command[@]} -gt 0 ] || fail "say after -- what sora-jax shall do"
chips=$((${topology//x/*}))

# name of the accelerator to GKE, dimensions of its topologies, chips of a host where a slice has several
case $type in
  v5e) accelerator=tpu-v5-lite-podslice dimensions=2 host=4 ;;
  v6e) accelerator=tpu-v6e-slice dimensions=2 host=4 ;;
  v5p) accelerator=tpu-v5p-slice dimensions=3 host=4 ;;
  tpu7x) accelerator=tpu7x dimensions=3 host=4 ;;
  *) fail "unknown --type $type; known: v5e, v5p, v6e, tpu7x" ;;
esac
across=${topology//[0-9]/}
[ $((${#across} + 1)) = $dimensions ] || fail "a topology of $type has $dimensions numbers, not $topology"
[ "$chips" -ge "$host" ] || host=$chips
[ $((chips % host)) = 0 ] || fail "$topology is $chips chips, which hosts of $host do not divide"

quote() { # a JSON string
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}
words=''
for word in "${command[@]}"; do words+="${words:+, }$(quote "$word")"; done

fill() { # fill WORD TEXT: the word in capitals becomes the text, which may hold anything
  local escaped
  escaped=$(printf '%s' "$2" | sed 's/[&|\\]/\\&/g')
  sed "s|\\b$1\\b|$escaped|g"
}
manifest=$(
  sed '/^#/d' "$here/jobset.yaml" | fill SLICES "$slices" | fill HOSTS $((chips / host)) | fill CHIPS "$host" |
    fill ACCELERATOR "$accelerator" | fill TOPOLOGY "$topology" | fill NAME "$name" | fill IMAGE "$image" |
    fill COMMAND "[$words]"
)
case $mode in
  print) printf '%s\n' "$manifest" ;;
  server) printf '%s\n' "$manifest" | kubectl apply --dry-run=server -f - ;;
  apply) printf '%s\n' "$manifest" | kubectl apply -f - ;;
esac
