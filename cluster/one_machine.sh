#!/usr/bin/env bash
# Ray on this machine alone: on the loopback only, with a token, and with a bounded object store.
#
#     cluster/one_machine.sh start             starts it; prints what the next line sets
#     eval "$(cluster/one_machine.sh env)"
#     ray job submit --working-dir . -- python jobs/pipeline.py --config pipeline.yaml
#     hashdist serve --config pipeline.yaml
#     cluster/one_machine.sh stop              ends what `start` started, and nothing else
#
# HASHDIST_RAY_FOLDER (~/.hashdist-ray) keeps the token, the log and Ray's sessions; other settings are below.
set -euo pipefail

folder=${HASHDIST_RAY_FOLDER:-$HOME/.hashdist-ray} # short: Unix sockets below it have at most 107 bytes of path
port=${HASHDIST_RAY_PORT:-6379}
dashboard=${HASHDIST_RAY_DASHBOARD_PORT:-8265}
agent=${HASHDIST_RAY_AGENT_PORT:-52365}
metrics=${HASHDIST_RAY_METRICS_PORT:-8080}
store_mb=${HASHDIST_RAY_OBJECT_STORE_MB:-2048}
cpus=${HASHDIST_RAY_CPUS:-$(nproc)}
((cpus >= 4)) || cpus=4 # logical ones: Ray Data and Ray Train need places for their own actors

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_USAGE_STATS_ENABLED=0
# Else Ray takes the loopback for a mistake and listens on all interfaces; despite its name it holds on Linux, too.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0

running() { [ -f "$folder/pid" ] && kill -0 "$(<"$folder/pid")" 2>/dev/null; }

environment() {
  printf 'export %s\n' "RAY_ADDRESS=127.0.0.1:$port" "RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard" \
    "RAY_AUTH_MODE=token" "RAY_AUTH_TOKEN_PATH=$folder/token" "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"
}

answers() { # the agent is what runs jobs, and comes last
  for open in "$dashboard" "$agent"; do
    (exec 3<>"/dev/tcp/127.0.0.1/$open") 2>/dev/null || return 1
  done
  ray job list --address "http://127.0.0.1:$dashboard" >/dev/null 2>&1
}

start() {
  if running; then
    echo "it runs already, as process $(<"$folder/pid")" >&2
    return 1
  fi
  mkdir -p -m 700 "$folder"
  [ -s "$folder/token" ] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/token")
  setsid ray start --head --block --disable-usage-stats --temp-dir="$folder/sessions" \
    --node-ip-address=127.0.0.1 --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --dashboard-agent-listen-port="$agent" --metrics-export-port="$metrics" \
    --num-cpus="$cpus" --object-store-memory="$((store_mb << 20))" \
    >"$folder/log" 2>&1 </dev/null &
  echo $! >"$folder/pid"
  for _ in $(seq 240); do
    if answers; then
      environment
      return
    fi
    running || break
    sleep 0.5
  done
  cat "$folder/log" >&2
  stop
  return 1
}

stop() {
  if running; then
    session=$(<"$folder/pid")
    kill -TERM "$session" # `ray start --block` gives tasks 30 s, and ends what it started
    for _ in $(seq 120); do
      pgrep --session "$session" >/dev/null || break
      sleep 0.5
    done
    pkill -KILL --session "$session" || true
  else
    echo "it does not run" >&2
  fi
  rm -f "$folder/pid"
}

case ${1:-} in
  start) start ;;
  env) environment ;;
  stop) stop ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
