#!/bin/sh
# Starts Valkey with the password of a file, or asks it whether it is well. A password on a command line
# would be for every user of the machine to read.
set -eu
password=$(cat "${QUEUE_PASSWORD_FILE:?names no file: it holds the password of the queue}")
[ -n "$password" ] || { echo "$QUEUE_PASSWORD_FILE is empty" >&2; exit 2; }

case "${1:-serve}" in
serve)
  umask 077
  printf 'requirepass "%s"\n' "$password" > /tmp/queue-password.conf
  # Full, it refuses what is new and everybody waits; without a limit the kernel would end it. 0: no limit.
  exec valkey-server /etc/tutelage/queue.conf --maxmemory "${QUEUE_MAXMEMORY:-0}"
  ;;
ping)
  export REDISCLI_AUTH="$password"
  answer=$(valkey-cli -h 127.0.0.1 --no-auth-warning ping)
  [ "$answer" = PONG ] || { echo "$answer" >&2; exit 1; }
  ;;
esac
