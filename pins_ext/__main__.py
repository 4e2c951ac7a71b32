"""`python -m pins_ext`: the command `pins-ext`."""

import sys

from pins_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
