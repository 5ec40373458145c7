# Set up a Debian 12 or Ubuntu machine: system packages, and a virtual environment in .venv.
# Sourced by images/demo.sh and tests/run.sh, which say what they need:
#   set_up "APT PACKAGES" "PIP EXTRAS"

say() {
    printf '\n== %s\n' "$*"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
    missing=
    for package in $1; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    say "installing$missing"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

set_up() {
    install_packages "python3 python3-venv $1"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; python3 is $(python3 --version)" >&2
        exit 1
    }
    if [ ! -x .venv/bin/python ]; then
        say "making the virtual environment .venv"
        python3 -m venv .venv
    fi
    # Once for each state of pyproject.toml.
    wanted="$2 $(cksum <pyproject.toml)"
    [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ] || return 0
    say "installing qemu_dump_ext with [$2]"
    .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$2]"
    # python-lzo is built from source, which not every machine can do.
    .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[lzo]" ||
        echo "python-lzo could not be built: everything works but -l (see above)" >&2
    echo "$wanted" >.venv/installed
}
