"""How long the command line takes to start: `trilemma --help` and `trilemma models`.

Each command runs several times as a process of its own, in turns; the median is shown beside the
limit that the project sets itself. Whether torch was imported is read from Python's import log.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

LIMITS = {"--help": 0.5, "models": 1.0}


def run(arguments: list[str], *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *flags, "-m", "trilemma", *arguments]
    # Without COLUMNS and a terminal the output is laid out alike everywhere.
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def imports_torch(command: str) -> bool:
    imported = run([command], "-X", "importtime").stderr
    return any(line.rpartition("|")[2].strip() == "torch" for line in imported.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    took: dict[str, list[float]] = {command: [] for command in LIMITS}
    for command in LIMITS:
        run([command])  # the first run writes Python's compiled files
    for _ in range(args.rounds):
        for command in LIMITS:
            start = time.perf_counter()
            run([command])
            took[command].append(time.perf_counter() - start)
    print("| command | seconds | limit | imports torch |")
    print("|---|---|---|---|")
    for command, limit in LIMITS.items():
        median = statistics.median(took[command])
        torch = "yes" if imports_torch(command) else "no"
        print(f"| trilemma {command} | {median:.2f} | {limit} | {torch} |")


if __name__ == "__main__":
    main()
