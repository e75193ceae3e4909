# What quickstart and check share: packages and a build. Sourced by them (bash); nothing runs by itself.
# root: the source tree.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Names as Debian 12 and Ubuntu 22.04 or later have them.
build_packages="gcc g++ make autoconf automake libtool pkg-config libopenblas-dev libhwloc-dev liburing-dev libpcre2-dev
 libutf8proc-dev libjansson-dev libedit-dev check python3"

say() { printf '== %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# setup_packages NAME...: install those that are missing. Root is asked for only here, and only if something is missing.
setup_packages() {
    local missing=() name as_root=()
    if ! command -v dpkg-query >/dev/null; then
        say "not a Debian system: make sure that these, or what your system calls them, are installed: $*"
        return 0
    fi
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || die "as root, run:  apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    say "installing ${missing[*]}${as_root:+ (sudo may ask for your password)}"
    "${as_root[@]}" apt-get -qq update >&2 || say "apt-get update failed; trying with the lists that are there"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >&2 ||
        die "apt-get could not install: ${missing[*]}"
}

# setup_pip: a python3 that has pip, for downloads; Debian ships them apart.
setup_pip() {
    python3 -m pip --version >/dev/null 2>&1 || setup_packages python3-pip
}

# setup_run LOG COMMAND...: quiet while all goes well, the end of the output when not.
setup_run() {
    local log=$1
    shift
    if ! "$@" >>"$log" 2>&1; then
        grep -E '(error|Error|\*\*\*)' "$log" | tail -n 15 >&2 || tail -n 30 "$log" >&2
        die "failed: $* (all of it: $log)"
    fi
}

# setup_build DIR [CONFIGURE OPTION...]: build in DIR; again with the same options it only builds what changed.
setup_build() {
    local dir=$1 log=$1/build.log
    shift
    mkdir -p "$dir"
    : >"$log"
    [ -x "$root/configure" ] || { say "bootstrap"; setup_run "$log" "$root/tools/bootstrap"; }
    if [ ! -f "$dir/Makefile" ] || [ "$(cat "$dir/.configured-with" 2>/dev/null)" != "$*" ]; then
        say "configure"
        (cd "$dir" && setup_run "$log" "$root/configure" "$@") || exit 1
        printf '%s\n' "$*" >"$dir/.configured-with"
    fi
    say "build in $dir (about a minute)"
    setup_run "$log" make -s -C "$dir" -j"$(nproc)"
}
