#!/usr/bin/env python3
"""The one command of lmweb: ``manage.py up`` starts everything, the rest works on the running instance."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command given on the command line."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lmweb.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
