# What the scripts of this folder share: packages, the virtual environment, the build, quiet steps. Sourced, not run.
# Everything is done only when it is missing or out of date, so each script may be run again at any time.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LOGS=build/logs
mkdir -p "$LOGS"

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# step TEXT COMMAND... : run quietly, print the text and the time taken; on failure print what the command said.
step() {
  local text=$1 began=$SECONDS log
  shift
  log=$LOGS/$(tr -cs 'a-zA-Z0-9.\n' '-' <<<"$text" | tr '[:upper:]' '[:lower:]').log
  printf '  %-44s ' "$text"
  if ("$@") >"$log" 2>&1; then
    printf '%3d s\n' $((SECONDS - began))
  else
    printf 'FAILED\n\n' && tail -n 60 "$log" >&2
    fail "$text failed; everything it said is in $log"
  fi
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    fail "'$*' needs root, and there is no sudo: run it as root and start again"
  fi
}

# need_packages NAME... : install the Debian packages of the list that are not installed. Starts no service.
need_packages() {
  local name missing=()
  for name in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
  done
  [ ${#missing[@]} = 0 ] || step "install ${missing[*]}" install_packages "${missing[@]}"
}

install_packages() {
  local policy=/usr/sbin/policy-rc.d own_policy=no status=0
  # A package's set-up asks this file whether it may start its service. The tests run servers of their own.
  if [ ! -e "$policy" ]; then
    own_policy=yes
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
  fi
  {
    as_root apt-get update &&
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
  } || status=$?
  [ "$own_policy" = no ] || as_root rm -f "$policy"
  return "$status"
}

# need PACKAGE TEXT CHECK... : make sure that a check succeeds, by the Debian package where there is apt-get.
need() {
  local package=$1 text=$2
  shift 2
  if "$@" >/dev/null 2>&1; then return; fi
  command -v apt-get >/dev/null || fail "$text is missing. On Debian it is the package $package; install your system's"
  need_packages "$package"
  "$@" >/dev/null 2>&1 || fail "$text is still missing after the package $package was installed"
}

has_header() { cc -E -x c - <<<"#include <$1>"; }

python_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

# Print the Python to build with: FASTQ_PYTHON, else the first that fits.
find_python() {
  local candidate
  for candidate in ${FASTQ_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if command -v "$candidate" >/dev/null && python_fits "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "needs Python 3.10 to 3.13; name one in FASTQ_PYTHON"
}

has_python_headers() {
  "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

# digest FILE... : print one hash over the names and contents.
digest() { sha256sum "$@" | sha256sum | cut -c1-32; }

sources() { find fastq \( -name '*.pyx' -o -name '*.pxd' -o -name '*.h' \) | LC_ALL=C sort; }

# has_modules PYTHON : whether every compiled module is there for this Python.
has_modules() {
  "$1" - <<'P'
import pathlib, sys, sysconfig
suffix = sysconfig.get_config_var("EXT_SUFFIX")
sys.exit(any(not path.with_name(path.stem + suffix).exists() for path in pathlib.Path("fastq").rglob("*.pyx")))
P
}

is_current() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

# make_environment FOLDER PYTHON EXTRAS : a virtual environment with fastq, built in place, and the named extras.
make_environment() {
  local folder=$1 python=$2 extras=$3 wanted_packages wanted_build
  if ! "$folder/bin/python" -c '' 2>/dev/null; then
    need python3-venv "Python's venv module" "$python" -c 'import ensurepip, venv'
    step "make $folder" "$python" -m venv --clear "$folder"
  fi
  need python3-dev "Python.h for $("$folder/bin/python" --version)" has_python_headers "$folder/bin/python"

  wanted_packages="$(digest pyproject.toml setup.py) $extras $PWD"
  wanted_build=$(sources | xargs sha256sum setup.py | sha256sum | cut -c1-32)
  if ! is_current "$folder/fastq-packages" "$wanted_packages"; then
    step "install build tools" "$folder/bin/python" -m pip install --quiet --upgrade 'setuptools>=77' 'Cython>=3.1' wheel
    step "build and install fastq${extras:+ with $extras}" \
      "$folder/bin/python" -m pip install --quiet --no-build-isolation --editable ".${extras:+[$extras]}"
    printf '%s' "$wanted_packages" >"$folder/fastq-packages"
  elif ! is_current "$folder/fastq-build" "$wanted_build" || ! has_modules "$folder/bin/python"; then
    step "build what has changed" "$folder/bin/python" setup.py build_ext --inplace
  fi
  printf '%s' "$wanted_build" >"$folder/fastq-build"
  # Where PYTHONDONTWRITEBYTECODE is set, each of some thousand processes would compile the package anew.
  "$folder/bin/python" -m compileall -q fastq tests bench examples
}

# What every script needs: compiler, librabbitmq, a virtual environment with fastq and the extras of $1.
set_up() {
  need build-essential "a C compiler" command -v cc
  need librabbitmq-dev "librabbitmq's header amqp.h" has_header amqp.h
  VENV=${FASTQ_VENV:-.venv}
  local python
  python=$(find_python)
  make_environment "$VENV" "$python" "$1"
}

need_servers() {
  need rabbitmq-server "RabbitMQ" test -x /usr/lib/rabbitmq/bin/rabbitmq-server
  need redis-server "Redis" command -v redis-server
  need postgresql "PostgreSQL" has_postgresql
}

# Debian keeps its server off the PATH.
has_postgresql() { command -v postgres || compgen -G "/usr/lib/postgresql/*/bin/postgres"; }

# Clients in other languages: Node.js with the locked npm packages, PHP with Debian's libraries.
need_clients() {
  local folder=tests/clients/node wanted
  need nodejs "Node.js" command -v node
  need npm "npm" command -v npm
  need php-cli "PHP" command -v php
  need php-amqplib "php-amqplib" test -d /usr/share/php/PhpAmqpLib
  need php-nrk-predis "Predis" test -d /usr/share/php/Predis
  wanted=$(digest "$folder/package.json" "$folder/package-lock.json")
  is_current "$folder/node_modules/fastq-lock" "$wanted" && return
  # npm knows its own certificate authorities only; behind a proxy with one of its own, the system's are needed.
  export NODE_EXTRA_CA_CERTS=${NODE_EXTRA_CA_CERTS:-/etc/ssl/certs/ca-certificates.crt}
  step "install clients for Node.js" npm --prefix "$folder" ci --ignore-scripts --no-audit --no-fund
  printf '%s' "$wanted" >"$folder/node_modules/fastq-lock"
}

# Tools attached to Celery that declare lower limits, on Celery's, redis-py's or Python's version, than they work with.
need_tools() {
  local list=tests/celery/tools/requirements-no-deps.txt wanted
  wanted=$(digest "$list")
  is_current "$VENV/fastq-tools" "$wanted" && return
  step "install tools attached to Celery" \
    "$VENV/bin/python" -m pip install --quiet --no-deps --ignore-requires-python --requirement "$list"
  printf '%s' "$wanted" >"$VENV/fastq-tools"
}
