#!/bin/sh
# One daemon and two processes that share only its socket, shown as in two terminals.
set -eu

folder=$(mktemp -d)
export TIERKV_SOCKET="$folder/daemon.sock"
trap 'tierkv daemon stop >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT INT TERM

say() { printf '\n\033[1m[%s]\033[0m $ %s\n' "$1" "$2"; }

say "terminal 1" "tierkv daemon start --detach --warm 256M --store $folder/store"
tierkv daemon start --detach --warm 256M --store "$folder/store"

say "terminal 1" "export TIERKV_SOCKET=$TIERKV_SOCKET"
say "terminal 1" 'tierkv run "What is a KV cache?" --system examples/system_prompts.txt --max-new-tokens 8'
tierkv run "What is a KV cache?" --system examples/system_prompts.txt --max-new-tokens 8

say "terminal 2" "export TIERKV_SOCKET=$TIERKV_SOCKET"
say "terminal 2" 'tierkv run "And who shares it?" --system examples/system_prompts.txt --max-new-tokens 8 --compare'
tierkv run "And who shares it?" --system examples/system_prompts.txt --max-new-tokens 8 --compare

say "terminal 1" "tierkv daemon status"
tierkv daemon status

say "terminal 1" "tierkv daemon stop"
tierkv daemon stop
