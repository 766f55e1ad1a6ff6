# Sourced by the other tools: brings .venv/ of this checkout up to date, with the extensions built in the tree.
#
#   In    $EXTRAS      extras of pyproject.toml to install (default: test)
#   Out   $ROOT, the checkout (and the current directory); $PYTHON, its .venv/bin/python
#
# Nothing is done when nothing has changed: .venv/stamp holds what the last set-up was made from.  Everything that
# is made goes into .venv/ (which ignores itself) except the extensions, beside their sources.  Bytecode as well,
# whatever the caller does with his own: a VMM starts in half the time with it, and hundreds are started.  Two at
# once wait for each other.  What cannot be had from here is named, with the command that would bring it.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
PYTHON=$ROOT/.venv/bin/python
EXTRAS=${EXTRAS:-test}
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$ROOT/.venv/cache/bytecode

missing() {
    echo "$(basename "$0"): $1" >&2
    exit 1
}

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    missing "no Python 3.11 or newer on PATH; on Debian 12: apt-get install python3 python3-venv python3-dev"
}

# What the set-up depends on, as one word.
fingerprint() {
    {
        echo "$ROOT ${EXTRAS} $("$BASE_PYTHON" -c 'import sys; print(sys.version, sys.base_prefix)')"
        find qemumig \( -name '*.pyx' -o -name '*.pxd' \) -print0 | sort -z | xargs -0 sha256sum
        sha256sum setup.py pyproject.toml tools/setup.sh
    } | sha256sum | cut -d' ' -f1
}

# Every module that has a source also has its extension (somebody may have cleaned the tree).
extensions_exist() {
    local source
    while read -r source; do
        compgen -G "${source%.pyx}.cpython-*.so" >/dev/null || return 1
    done < <(find qemumig -name '*.pyx')
}

check_needs() {
    command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
        missing "no C compiler on PATH; on Debian: apt-get install gcc libc6-dev"
    "$BASE_PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
        missing "$BASE_PYTHON has no venv module; on Debian: apt-get install python3-venv"
    [ -e "$("$BASE_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
        missing "$BASE_PYTHON has no header files (Python.h); on Debian: apt-get install python3-dev"
}

make_venv() {
    check_needs
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        echo "setting up .venv with $BASE_PYTHON" >&2
        "$BASE_PYTHON" -m venv .venv
    fi
    echo "building the extensions" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check 'setuptools>=68' 'cython>=3.1' wheel ||
        missing "pip cannot install the build tools (see above); it needs a package index to ask"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        --no-build-isolation --editable ".[$EXTRAS]" ||
        missing "the package does not build or one of its dependencies cannot be installed (see above)"
}

BASE_PYTHON=$(find_python) || exit 1
mkdir -p .venv
echo '*' >.venv/.gitignore
exec 9>.venv/lock
flock 9
STAMP=$(fingerprint)
if [ "$(cat .venv/stamp 2>/dev/null)" != "$STAMP" ] || ! extensions_exist; then
    rm -f .venv/stamp
    make_venv
    echo "$STAMP" >.venv/stamp
fi
exec 9>&-
