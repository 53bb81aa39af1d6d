"""``python -m benchmarks``: this project beside its peers, as ratios measured in one run.

A call that was stopped can be repeated: it goes on after the last round that it has measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import figure
from benchmarks.plan import Plan
from benchmarks.programs import OTHERS
from benchmarks.report import Row, print_table
from benchmarks.sections import SECTIONS, Section
from benchmarks.store import MeasurementStore, settings
from ddp_tutorial.files import write_atomically


def new_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"some of: {', '.join(SECTIONS)} (all)")
    parser.add_argument("--quick", action="store_true", help="one minute: all of it once, on little data")
    parser.add_argument(
        "--again", action="store_true", help="forget what a stopped call has left in --out, and measure it anew"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks"),
        help="folder for results.json, the figures, data, and what a call measures, until its end (%(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code; leaves with 2 if a flag is wrong."""
    parser, start = new_parser(), time.monotonic()
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"there is no section {unknown[0]}: choose from {', '.join(SECTIONS)}")
    names = args.sections or list(SECTIONS)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        store = MeasurementStore(args.out / "measured.json", settings(args.quick), args.again)
    except ValueError as error:
        parser.error(str(error))
    say_what_is_left_out(names, store)
    plan = Plan(args.out, args.quick, store)
    results = {}
    for name in names:
        results[name] = SECTIONS[name].rows(replace(plan, section=name))
        print_section(SECTIONS[name], results[name])
        tables = {measured: [row.cells() for row in rows] for measured, rows in results.items()}
        write_atomically(args.out / "results.json", json.dumps(tables, indent=1).encode())
    save_figures(results, args.out)
    store.forget(names)
    print(f"\n{args.out / 'results.json'}, after {time.monotonic() - start:.0f} s")
    return 0


def say_what_is_left_out(names: Sequence[str], store: MeasurementStore) -> None:
    """Peers that are not installed, and what a call before this one has measured."""
    if missing := sorted({program.name.partition(",")[0] for program in OTHERS if not program.is_installed}):
        print(f"{', '.join(missing)} left out: pip install -e '.[bench]' adds them", file=sys.stderr)
    if counts := ", ".join(f"{name} ({len(store.sections[name])})" for name in names if name in store.sections):
        print(f"measured by a call that was stopped, and not again: {counts}", flush=True)


def print_section(section: Section, rows: Sequence[Row]) -> None:
    """Its name, what it measures, and its table, or what it needs."""
    print(f"\n{section.name}: {section.rows.__doc__.splitlines()[0]}", flush=True)
    if rows:
        print_table(rows)
    else:
        print(f"  not here: this needs {section.needs}", flush=True)


def save_figures(results: dict[str, Sequence[Row]], folder: Path) -> None:
    """Those of the sections that have measured something."""
    if rows := results.get("training"):
        figure.peers(rows).savefig(folder / "peers.png", dpi=150)
    if drawn := figure.gpu(results.get("gpu", [])):
        drawn.savefig(folder / "gpu.png", dpi=150)
    if rows := results.get("network"):
        drawn = figure.network(rows)
        drawn.savefig(folder / "network.png", dpi=150, metadata={"Title": drawn.get_suptitle()})
