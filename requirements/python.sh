#!/bin/sh
# Prints the interpreter that the virtual environment is made of: the first `python3`, or the system's where that is clearly faster.
# One that a version manager compiled without profile-guided optimisation takes half as long again for everything that is Python
# here. Debian packs what makes environments apart, so one without it is passed over.
set -u
first= least=
for python in python3 /usr/bin/python3; do
    command -v "$python" >/dev/null || continue
    took=$("$python" - <<'END' 2>/dev/null
import ensurepip, sys, timeit, venv
if sys.version_info < (3, 11):
    sys.exit(1)
print(int(1_000_000 * min(timeit.repeat("for i in range(20_000): d[i % 100] = str(i)", "d = {}", number=1, repeat=15))))
END
    ) || continue
    if [ -z "$first" ]; then
        first=$python least=$took
    elif [ $((took * 5)) -lt $((least * 4)) ]; then
        echo "$python is faster than $first ($took and $least microseconds for the same): PYTHON=$first takes that one" >&2
        first=$python least=$took
    fi
done
echo "${first:-python3}"
