# make demo    three hosts, a replicated LUN, a crash and a failover (as root)
# make test    everything that can be checked; what .ci/run calls (as root)
# make bench   QEMU's replication and ours side by side; QUICK=1 for a short run (as root)
# make soak    N random sequences on QEMU and on ours, and the longer rounds of the crash tests (as root)
# make fuzz    every parser of outside bytes, SECONDS each
# make lint    ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TO ?= latest
# What the tests and the demo use of Debian; docs/dependencies.md says what for.
PACKAGES := user-mode-linux kmod qemu-utils qemu-system-x86 nbdkit libnbd-bin fio open-iscsi \
	gcc libc6-dev e2fsprogs xfsprogs dbus dmsetup systemd iproute2 sg3-utils openssl python3-venv
TEST_ARGS ?=
N ?= 200
SECONDS ?= 60

.PHONY: bench demo test soak fuzz lint unit tools clean

test: tools $(VENV)/installed lint
	$(BIN)/python -m pytest $(TEST_ARGS)

unit: $(VENV)/installed
	$(BIN)/python -m pytest tests/unit tests/property $(TEST_ARGS)

soak: tools $(VENV)/installed
	TCMU_REPLICATION_SOAK=$(N) $(BIN)/python -m pytest tests/interop/test_qemu_differential.py tests/interop/test_qemu_primary.py \
		tests/interop/test_qemu_defects.py tests/system/test_random_pair.py $(TEST_ARGS)

fuzz: $(VENV)/fuzz
	$(BIN)/python -m tests.fuzz.run $(SECONDS) $(TARGETS)

demo: tools $(VENV)/installed
	$(BIN)/python -m tests.lab.demo --to $(TO)

bench: tools $(VENV)/installed
	$(BIN)/python -m benchmarks $(if $(QUICK),--scale quick) $(BENCH_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

tools:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'install ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "installing:" $$missing; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	fi

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/fuzz: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis lab-logs fuzz-work
