# SPDX-License-Identifier: Apache-2.0
"""`python -m minigold` is the command `minigold`."""

from minigold.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
