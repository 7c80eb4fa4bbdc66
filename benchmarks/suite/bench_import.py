"""What a start costs: `import streamcrypt` and the command line."""

from __future__ import annotations

import subprocess
import sys


def timeraw_import():
    return "import streamcrypt"


class Command:
    def time_empty_python(self):
        subprocess.run([sys.executable, "-c", "pass"], check=True)

    def time_version(self):
        subprocess.run(
            [sys.executable, "-m", "streamcrypt", "--version"], check=True, stdout=subprocess.DEVNULL
        )
