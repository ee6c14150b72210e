"""Teleport tiny versions of the architectures that Transformers ships, or turn their symmetries, and write down how it went.

    python scripts/zoo/report.py teleports --output docs/zoo.md                # all of them, a few minutes on one core
    python scripts/zoo/report.py symmetries --output docs/zoo_symmetries.md    # all of them, five minutes on one core
    python scripts/zoo/report.py teleports llama mixtral vit                   # some, to the screen

Rerun both for a new release of Transformers.
"""

import argparse
import json
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import symmetries
import teleports
from architectures import FAMILIES, NAMES

# Each has `measure(name)`, which gives a row; `cells(row)` and `header(rows, failed)` say it in Markdown.
REPORTS = {"teleports": teleports, "symmetries": symmetries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", choices=REPORTS, help="what is done with each architecture")
    parser.add_argument("names", nargs="*", default=NAMES, help="architectures; default: all")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file, and its numbers beside it as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    report, rows, failed = REPORTS[args.report], [], {}
    for name in tqdm(args.names, unit="model"):
        try:
            rows.append(report.measure(name))
        except Exception as error:  # the table is to say which architecture fails, and go on
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            tqdm.write("".join(traceback.format_exc(limit=-3)))
    family_of = {name: family for family, names in FAMILIES.items() for name in names}
    lines = report.header(rows, len(failed)).splitlines()
    lines += ["| " + " | ".join([family_of[row.name], row.name, *report.cells(row)]) + " |" for row in rows]
    lines += [f"\n- {name} failed: {reason}" for name, reason in failed.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)
        args.output.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
