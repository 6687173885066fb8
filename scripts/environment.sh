# Sourced by the other scripts: `environment DIR EXTRAS` makes the virtual environment DIR and installs ringjax
# with the given extras into it, or leaves both as they are when nothing has changed since.

# The first Python that is new enough: $PYTHON if set, else python3, else the newest python3.x there is.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "ringjax needs Python 3.11 or newer; found: $({ ${PYTHON:-python3} --version || echo none; } 2>/dev/null | head -1)." \
        "Install one, or name it: PYTHON=/path/to/python3 bash $0" >&2
    return 1
}

environment() {
    local dir=$1 extras=$2 python wanted
    # One line for each set of extras that was installed from this pyproject.toml.
    wanted="$extras $(cksum <pyproject.toml)"
    if [ -x "$dir/bin/python" ] && grep -qsxF "$wanted" "$dir/installed"; then
        return 0
    fi
    python=$(find_python) || return 1
    if [ ! -x "$dir/bin/python" ]; then
        echo "making $dir with $("$python" --version)"
        "$python" -m venv "$dir" || { echo "cannot make $dir; on Debian: apt-get install python3-venv" >&2; return 1; }
    fi
    echo "installing ringjax[$extras] into $dir (a few minutes the first time)"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]" || return 1
    echo "$wanted" >>"$dir/installed"
}
