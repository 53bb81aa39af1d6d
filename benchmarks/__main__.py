"""``python -m benchmarks``: this project beside its peers, as ratios measured in one run.

A call that was stopped can be repeated: it goes on after the last round that it has measured.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


def print_table(name: str, description: str, rows: list[dict], needs: str = "") -> None:
    print(f"\n{name}: {description}", flush=True)
    if not rows:
        print(f"  not here: this needs {needs}", flush=True)
        return
    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def show(value) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; torchrun's ranks have one thread too
    from benchmarks import figure, kept, sections
    from ddp_tutorial.files import write_atomically

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"some of: {', '.join(sections.SECTIONS)} (all)")
    parser.add_argument("--quick", action="store_true", help="one minute: all of it once, on little data")
    parser.add_argument("--again", action="store_true", help="forget what a stopped call has left in --out, and measure it anew")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for results.json, peers.png, data, and what a call measures, until its end (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    unknown = [name for name in args.sections if name not in sections.SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]}: choose from {', '.join(sections.SECTIONS)}")
    missing = sorted({peer.partition(",")[0] for peer in sections.PEERS if not sections.installed(peer)})
    if missing:
        print(f"{', '.join(missing)} left out: pip install -e '.[bench]' adds them", file=sys.stderr)
    names, results, start = args.sections or list(sections.SECTIONS), {}, time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        store = kept.Kept(args.out / "measured.json", kept.settings(args.quick), args.again)
    except ValueError as error:
        parser.error(str(error))
    if before := {name: len(store.sections[name]) for name in names if name in store.sections}:
        counts = ", ".join(f"{name} ({n})" for name, n in before.items())
        print(f"measured by a call that was stopped, and not again: {counts}", flush=True)
    plan = sections.Plan(args.out, args.quick, store)
    for name in names:
        plan.section = name
        results[name] = sections.SECTIONS[name](plan)
        about = sections.SECTIONS[name].__doc__.splitlines()[0]
        print_table(name, about, results[name], sections.NEEDS.get(name, ""))
        write_atomically(args.out / "results.json", json.dumps(results, indent=1).encode())
    if "training" in results:
        figure.peers(results["training"]).savefig(args.out / "peers.png", dpi=150)
    if ladder := figure.gpu(results.get("gpu", [])):
        ladder.savefig(args.out / "gpu.png", dpi=150)
    if cables := figure.network(results.get("network", [])):
        cables.savefig(args.out / "network.png", dpi=150, metadata={"Title": cables.get_suptitle()})
    store.forget(names)
    print(f"\n{args.out / 'results.json'}, after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
