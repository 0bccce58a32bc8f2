#!/usr/bin/env python3
"""From a fresh clone to a video: `python quickstart.py`; `--help` lists the options. See bootstrap/ for the code.

This file keeps to syntax that any Python reads, so that an old one says what it needs instead of failing.
"""

import os
import sys

if __name__ == "__main__":
    if not (3, 10) <= sys.version_info[:2] < (3, 15):
        sys.stderr.write(
            "quickstart: this is Python %d.%d; the pinned packages need 3.10 to 3.14. Run this file with one of "
            "those, e.g. `python3.12 quickstart.py`.\n" % sys.version_info[:2]
        )
        sys.exit(1)
    from importlib.util import find_spec

    if find_spec("venv") is None:
        sys.stderr.write(
            "quickstart: this Python has no venv, as the one in ComfyUI's portable build. Install Python 3.12 from "
            'python.org, or install the pack into your ComfyUI: README.md, "Use it in your ComfyUI".\n'
        )
        sys.exit(1)
    # An embedded Python does not look for modules beside the script.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from bootstrap.cli import main

    sys.exit(main())
