"""The `hf-teleport` command."""

import argparse
import sys

from hf_teleport.commands import compare, doctor, experiment, inspect, plot, report, train, turn_back
from hf_teleport.commands.parser import Help
from hf_teleport.version import __version__

COMMANDS = (inspect, doctor, train, experiment, compare, plot, report, turn_back)

_EPILOG = """For instance:
  hf-teleport doctor
  hf-teleport train glue configs/examples/sst2_glue.yaml

Exit codes: 0 done; 1 a run failed, with its traceback, or doctor found that something required is missing; 2 arguments, \
settings or files are wrong; 130 interrupted."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done; 1 `doctor` found that something required is missing; 2 bad input; 130 interrupted. Other errors
        of a run are raised.
    """
    parser = argparse.ArgumentParser(
        prog="hf-teleport", formatter_class=Help, description="Teleportation for Transformers models.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"hf-teleport {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"hf-teleport: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-teleport: interrupted; an experiment goes on when it is started again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
