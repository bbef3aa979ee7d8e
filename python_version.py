"""Which Pythons this works with; imported first, so that another one is refused in one line (exit code 2).

Any Python 3 must be able to read this file. The Makefile runs it before it makes an environment.
"""

import sys

OLDEST, NEWEST = (3, 11), (3, 13)

if not OLDEST <= sys.version_info[:2] <= NEWEST:
    sys.stderr.write(
        "error: this is Python %d.%d; Python %d.%d to %d.%d is needed (with make: PYTHON=python3.12)\n"
        % (sys.version_info[:2] + OLDEST + NEWEST)
    )
    sys.exit(2)
