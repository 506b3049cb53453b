#!/usr/bin/env bash
# Show Alveole at work: nginx as a container and redis as a sandbox, each reached through a published port.
#   tools/demo.sh         start it, or show it again
#   tools/demo.sh clean   remove its instances and images, and stop the daemon if the demo started it
set -euo pipefail
cd "$(dirname "$0")/.."

PID_FILE=/run/alveole-demo.pid
LOG=/var/log/alveole-demo.log
STATE=/var/lib/alveole
MADE_STATE=/run/alveole-demo.made-state # there if the state directory is the demo's
READY_WITHIN_S=20
INSTANCES=(demo-web demo-cache)
IMAGES=(demo-nginx demo-redis)

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

port_of() { # instance, port wanted: the one it has published, else the first free one from the one wanted
    local published port=$2
    published=$(alveole inspect "$1" 2>/dev/null | grep -o '"host_port": *[0-9]*' | grep -o '[0-9]*$' | head -n 1) || true
    [[ -z $published ]] || { echo "$published"; return; }
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do ((port += 1)); done
    echo "$port"
}

ask() { # port, request: prints the first line of the answer
    local answer
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf '%b' "$2" >&3
    IFS= read -r -t 5 answer <&3 || return 1
    exec 3>&-
    printf '%s\n' "${answer%$'\r'}"
}

request() { # what, port, request, expected answer
    local answer
    within "$READY_WITHIN_S" ask "$2" "$3" >/dev/null 2>&1 || die "$1 does not answer on port $2"
    answer=$(ask "$2" "$3")
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
    cat <<END

Both are running. Go on:
  .venv/bin/alveole exec -it demo-web bash      a shell in the container
  .venv/bin/alveole logs -f demo-cache          follow what redis writes
  .venv/bin/alveole --help                      all there is
Stop:
  .venv/bin/alveole stop demo-web demo-cache    stop both; alveole start brings them back
  make clean                                    remove all of the demo
END
}

show_steps() { # what was done to make each of the two, step by step
    local name operation operations
    operations=$(alveole operation ls)
    for name in "${INSTANCES[@]}"; do
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
