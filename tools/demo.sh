#!/usr/bin/env bash
# Show Alveole at work: nginx as a container and redis as a sandbox, each reached through a published port; then the
# same nginx behind all three walls, and a fork of the machine, side by side; then twenty clones of that machine, a fork
# of one that was changed, and the changed one begun anew.
#   tools/demo.sh         start it, or show it again
#   tools/demo.sh clean   remove its instances and images, and stop the daemon if the demo started it
set -euo pipefail
cd "$(dirname "$0")/.."

PID_FILE=/run/alveole-demo.pid
LOG=/var/log/alveole-demo.log
STATE=/var/lib/alveole
RUN=/run/alveole
MADE_STATE=/run/alveole-demo.made-state # there if the state directory is the demo's
READY_WITHIN_S=30
WALLS=(demo-web demo-web-sandbox demo-web-vm demo-web-fork) # one image
INSTANCES=(demo-cache "${WALLS[@]}")
IMAGES=(demo-nginx demo-redis)
CLONES=20
PAGE=/var/www/html/index.html

alveole() { .venv/bin/alveole "$@"; }
die() { printf 'demo: %s\n' "$*" >&2; exit 1; }

show() { # prints a command as a user would type it, then runs it
    printf '\n\e[1m$ alveole %s\e[0m\n' "$*"
    alveole "$@"
}

answering() { alveole ls --quiet >/dev/null 2>&1; }

within() { # seconds, then a command: until it succeeds
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

ensure_daemon() {
    answering && return
    alveole doctor >/dev/null || alveole doctor --fix || die "this host lacks something: see above"
    [[ -e $STATE ]] || touch "$MADE_STATE"
    setsid .venv/bin/alveole serve >>"$LOG" 2>&1 </dev/null &
    echo $! >"$PID_FILE"
    within "$READY_WITHIN_S" answering || { tail -n 20 "$LOG" >&2; die "the daemon does not answer; its log is $LOG"; }
}

ensure_image() { # name, recipe
    [[ $'\n'$(alveole image ls --quiet)$'\n' == *$'\n'"$1:latest"$'\n'* ]] || show image build "$1" "$2"
}

ensure_instance() { # name, then the rest of `alveole run`
    local name=$1
    shift
    if alveole inspect "$name" >/dev/null 2>&1; then
        alveole start "$name" >/dev/null
    else
        show run --detach --name "$name" "$@"
    fi
}

ensure_fork() { # original, name
    if alveole inspect "$2" >/dev/null 2>&1; then
        alveole start "$2" >/dev/null
    else
        show fork --name "$2" "$1"
    fi
}

address_of() { alveole inspect "$1" | grep -o '"address": *"[0-9.]*"' | grep -o '[0-9.]*[0-9]' | head -n 1; }

port_of() { # instance, port wanted: the one it has published, else the first free one from the one wanted
    local published port=$2
    published=$(alveole inspect "$1" 2>/dev/null | grep -o '"host_port": *[0-9]*' | grep -o '[0-9]*$' | head -n 1) || true
    [[ -z $published ]] || { echo "$published"; return; }
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do ((port += 1)); done
    echo "$port"
}

ask() { # address, port, request: prints the first line of the answer
    local answer
    exec 3<>"/dev/tcp/$1/$2" || return 1
    printf '%b' "$3" >&3
    IFS= read -r -t 5 answer <&3 || return 1
    exec 3>&-
    printf '%s\n' "${answer%$'\r'}"
}

request() { # what, port, request, expected answer
    local answer
    within "$READY_WITHIN_S" ask 127.0.0.1 "$2" "$3" >/dev/null 2>&1 || die "$1 does not answer on port $2"
    answer=$(ask 127.0.0.1 "$2" "$3")
    printf '\n%s on port %s answers: %s\n' "$1" "$2" "$answer"
    [[ $answer == "$4"* ]] || die "expected $4"
}

start() {
    local web cache
    tools/setup.sh run
    ensure_daemon
    ensure_image demo-nginx recipes/nginx.toml
    ensure_image demo-redis recipes/redis.toml
    web=$(port_of demo-web 8080)
    cache=$(port_of demo-cache 6379)
    ensure_instance demo-web --publish "$web:80" demo-nginx
    ensure_instance demo-cache --isolation sandbox --publish "$cache:6379" demo-redis

    request nginx "$web" 'GET / HTTP/1.0\r\n\r\n' 'HTTP/1.1 200'
    request redis "$cache" 'PING\r\n' '+PONG'
    show ls
    show logs --tail 3 demo-web
    show stats --no-stream
    show_steps
    compare_walls
    clone_and_recreate
    cat <<END

All are running. Go on:
  .venv/bin/alveole exec -it demo-web bash      a shell in the container
  .venv/bin/alveole exec demo-web-vm uname -a   the machine's own kernel
  .venv/bin/alveole logs -f demo-cache          follow what redis writes
  .venv/bin/alveole --help                      all there is
Stop:
  .venv/bin/alveole stop demo-web demo-cache    stop two; alveole start brings them back
  make clean                                    remove all of the demo
END
}

compare_walls() { # the same image behind each wall
    local name
    ensure_instance demo-web-sandbox --isolation sandbox demo-nginx
    ensure_instance demo-web-vm --isolation vm --memory 256m --health-cmd 'test -s /run/nginx.pid' \
        --health-interval 60s demo-nginx # two dozen interpreted machines that each run bash every ten seconds are much
    for name in demo-web-sandbox demo-web-vm; do answers "$name"; done
    ensure_fork demo-web-vm demo-web-fork # of an nginx that serves
    answers demo-web-fork
    printf '\nOne image behind three walls, and a fork of the third:\n'
    .venv/bin/python tools/demo_walls.py "${WALLS[@]}"
}

clone_and_recreate() { # what is running in demo-web-vm, many times
    local clones=() number began evidence
    for ((number = 1; number <= CLONES; number++)); do clones+=("demo-clone-$number"); done
    alveole rm --force "${clones[@]}" demo-changed >/dev/null 2>&1 || true
    began=$EPOCHREALTIME
    show fork --count "$CLONES" --name-prefix demo-clone- demo-web-vm
    for number in "${clones[@]}"; do answers "$number"; done
    awk -v from="$began" -v to="$EPOCHREALTIME" -v clones="$CLONES" \
        'BEGIN { printf "\n%d clones answer, %.1f s after the first was asked for.\n", clones, to - from }'
    show exec demo-clone-1 sh -c "echo compromised >$PAGE"
    show fork --name demo-changed demo-clone-1
    show recreate --keep-evidence demo-clone-1
    answers demo-clone-1
    show exec demo-changed cat "$PAGE" # what was changed is in its fork
    alveole exec demo-clone-1 test ! -e "$PAGE" || die "demo-clone-1 was not begun anew"
    mapfile -t evidence < <(alveole snapshot ls --quiet demo-clone-1)
    alveole snapshot rm "${evidence[@]}" >/dev/null
    alveole rm --force "${clones[@]}" demo-changed >/dev/null
}

answers() { # instance: until it serves
    within "$READY_WITHIN_S" ask "$(address_of "$1")" 80 'GET / HTTP/1.0\r\n\r\n' >/dev/null 2>&1 ||
        die "$1 does not answer"
}

show_steps() { # what was done to make each of the first two, step by step
    local name operation operations
    operations=$(alveole operation ls)
    for name in demo-web demo-cache; do
        operation=$(awk -v name="/$name\$" '$2 == "instance.run" && $3 ~ name { id = $1 } END { print id }' <<<"$operations")
        [[ -z $operation ]] || show operation show "$operation"
    done
}

clean() {
    local left=unknown
    if [[ -x .venv/bin/alveole ]] && answering; then
        alveole rm --force "${INSTANCES[@]}" >/dev/null 2>&1 || true
        alveole image rm "${IMAGES[@]}" >/dev/null 2>&1 || true
        left=$(alveole ls --quiet && alveole image ls --quiet && alveole volume ls --quiet) || left=unknown
    fi
    stop_daemon
    # What somebody made beside the demo is not the demo's to remove.
    [[ $left || ! -e $MADE_STATE ]] || rm -rf "$STATE" "$MADE_STATE"
    rm -f "$PID_FILE" "$LOG"
    answering || [[ ! -d $RUN ]] || find "$RUN" -xdev -depth -type d -empty -delete
}

stop_daemon() { # only the one that this demo started
    local pid
    [[ -f $PID_FILE ]] || return 0
    pid=$(<"$PID_FILE")
    [[ $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) == *alveole\ serve* ]] || return 0
    kill "$pid"
    within "$READY_WITHIN_S" test ! -d "/proc/$pid" || kill -KILL "$pid"
}

case ${1:-start} in
    start) start ;;
    clean) clean ;;
    *) die "usage: tools/demo.sh [clean]" ;;
esac
