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
  exec valkey-server /etc/tutelage/queue.conf
  ;;
ping)
  export REDISCLI_AUTH="$password"
  answer=$(valkey-cli -h 127.0.0.1 --no-auth-warning ping)
  [ "$answer" = PONG ] || { echo "$answer" >&2; exit 1; }
  ;;
esac
