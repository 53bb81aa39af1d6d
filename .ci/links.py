"""Ask every web address in the README, the notebooks, the documents and the programs whether it answers.

    python .ci/links.py         # prints those that do not; leaves with 1 if there are any
    python .ci/links.py --list  # asks nothing, needs no network: prints each address and one file that has it

It runs weekly on GitHub and is no test: other people's servers decide how it ends.
"""

import argparse
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", ".github", "benchmarks", "data_gen", "ddp_tutorial", "docs", "notebooks")
SUFFIXES = {".cff", ".ipynb", ".md", ".py", ".toml", ".yml"}
MADE = {".ipynb_checkpoints", "_build", "data", "runs"}
ADDRESS = re.compile(r"https?://[^\s<>\"'`\\{}|^\[\]]+")
REFUSES_ROBOTS = {401, 403, 429}  # the page may well be there


def addresses(text: str) -> set[str]:
    """The addresses in a text, without what ends the sentence or the brackets around them."""
    found = set()
    for address in ADDRESS.findall(text):
        while address[-1] in ".,;:!?*" or address.endswith(")") and address.count("(") < address.count(")"):
            address = address[:-1]
        found.add(address)
    return found


def text_of(path: Path) -> str:
    """What a file says; of a notebook the cells, without their outputs."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def all_addresses() -> dict[str, str]:
    """The addresses, and for each one file that has it. The tests' own are made up and left out."""
    files = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))]
    files = [path for path in files if path.suffix in SUFFIXES and not MADE & set(path.parts)]
    found = {address: path.relative_to(ROOT).as_posix() for path in files for address in addresses(text_of(path))}
    return {address: name for address, name in sorted(found.items()) if "//127.0.0.1" not in address}


def problem(address: str, pauses: tuple[float, ...] = (5, 30)) -> str:
    """Why an address does not answer, after a second and a third try; "" if it does."""
    for pause in (*pauses, None):
        try:
            with urlopen(Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"}), timeout=30):
                return ""
        except HTTPError as error:
            why = "" if error.code in REFUSES_ROBOTS else f"status {error.code}"
        except Exception as error:  # no such host, no answer, a bad certificate, no HTTP
            why = f"{type(error).__name__}: {error}"
        if not why or pause is None:
            return why
        time.sleep(pause)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the addresses without asking")
    found = all_addresses()
    if parser.parse_args().list:
        print("\n".join(f"{address}  ({name})" for address, name in found.items()))
        sys.exit()
    with ThreadPoolExecutor(8) as pool:
        broken = {address: why for address, why in zip(found, pool.map(problem, found), strict=True) if why}
    for address, why in broken.items():
        print(f"{found[address]}: {address}: {why}")
    print(f"{len(found)} addresses, {len(broken)} of them broken")
    sys.exit(bool(broken))
