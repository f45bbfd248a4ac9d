"""python -m pyarch COMMAND: --help tells the commands and each one's options."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "generate": "a language model answers a prompt",
    "demo": "SmolLM2 answers through pyarch and through plain PyTorch, side by side",
    "doctor": "what this machine has, which backends run here, and what to do about the others",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Its module is imported for its arguments, what it works with only when it runs."""
    parser = argparse.ArgumentParser(prog="python -m pyarch", description="pyarch on the command line")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        module = importlib.import_module(f".cli.{name}", __package__)
        sub = subparsers.add_parser(name, help=what, description=f"{name}: {what}")
        module.add_arguments(sub)
        sub.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    return args.main(args) or 0


if __name__ == "__main__":
    sys.exit(main())
