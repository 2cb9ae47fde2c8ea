#!/bin/sh
# Runs the Python tests, in a virtual environment of their own with the packages of requirements.txt.
#
#   sh tests/python/run.sh
#   sh tests/python/run.sh --prepare        makes the environment and runs nothing
#
# MEGALODON_BIN and MEGALODON_BUILD say where the programs and the environment are, PYTHON which Python to use. The last
# line is "N passed, N failed", the exit status 0 only if nothing failed. Without a package index nothing is tested, and
# a line says so.

bin=$(cd "${MEGALODON_BIN:-.}" && pwd) || exit 1
build=${MEGALODON_BUILD:-build}
python=${PYTHON:-python3}
wanted=tests/python/requirements.txt
venv=$build/venv
log=$build/venv.log

stop() {                                    # stop STATUS FAILED TEXT
    echo "$3"
    echo "0 passed, $2 failed"
    exit "$1"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null ||
    stop 0 0 "skipped: the Python tests need Python 3.11 or later, found $("$python" --version 2>&1 | tail -n 1)"

# The environment holds for as long as the list of packages does.
if ! cmp -s "$wanted" "$venv/installed"; then
    mkdir -p "$build"
    "$python" -m venv --clear "$venv" > "$log" 2>&1 ||
        stop 1 1 "$python -m venv failed, see $log; on Debian and Ubuntu: apt-get install python3-venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check"
    # PyTorch's own index has builds for CPUs, a tenth of the size of what Linux gets elsewhere.
    if [ "$(uname -s)" = Linux ]; then
        $pip install -q --no-compile --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu \
            "$(grep '^torch==' "$wanted")" >> "$log" 2>&1
    fi
    if ! $pip install -q --no-compile -r "$wanted" >> "$log" 2>&1; then
        # Is it the network, or is it the list?
        $pip install -q --dry-run --no-deps --ignore-installed --retries 0 --timeout 10 \
            "$(grep '^safetensors==' "$wanted")" >> "$log" 2>&1 ||
            stop 0 0 "skipped: no Python package can be installed here, see $log"
        tail -n 20 "$log"
        stop 1 1 "the packages of $wanted cannot be installed"
    fi
    cp "$wanted" "$venv/installed"
fi
[ "$1" != --prepare ] || exit 0

# Pictures are drawn without a screen, and nothing is written beside the sources.
export MPLBACKEND=Agg MPLCONFIGDIR="$build/matplotlib" PYTHONDONTWRITEBYTECODE=1
set --
for test in tests/python/test_*.py; do
    set -- "$@" "$venv/bin/python $test --bin $bin"
done
MEGALODON_BUILD=$build/python exec sh tests/run.sh "$@"
