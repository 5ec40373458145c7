# Set up a machine with Debian 12, Debian 13 or Ubuntu: system packages, and a virtual environment in .venv.
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
        apt-get install -o DPkg::Lock::Timeout=600 -y -qq --no-install-recommends $missing >/dev/null
}

pip_install() {
    .venv/bin/python -m pip install -q --disable-pip-version-check -c images/constraints.txt -e "$1"
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
    # Once for each state of what is asked for.
    wanted="$2 $(cat pyproject.toml images/constraints.txt | cksum)"
    [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ] || return 0
    say "installing qemu_dump_ext with [$2]"
    pip_install ".[$2]"
    # python-lzo is built from source, which not every machine can do.
    pip_install ".[lzo]" ||
        echo "python-lzo could not be built: everything works but -l (see above)" >&2
    echo "$wanted" >.venv/installed
}
