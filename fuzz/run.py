"""Run the fuzzers for a number of cases and report to build/reports/fuzz.json. `make fuzz` is this.

Descriptor rings: libFuzzer, on stable Rust (the coverage pass is part of LLVM, and libFuzzer of its crate), one process
per core; what it learns is kept in build/fuzz/corpus, and starts from fuzz/corpus. vhost-user messages: messages.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/fuzz"
SEEDS = ROOT / "fuzz/corpus/rings"
COVERAGE = (
    "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 "
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table --cfg fuzzing"
)
CASE_BYTES_MAX = 512
TIMEOUT_S = 30
EXECUTED = re.compile(r"^stat::number_of_executed_units:\s+(\d+)", re.MULTILINE)
COVERED = re.compile(r"cov: (\d+)")


def build_rings() -> Path:
    """Build the ring fuzzer; its path."""
    host = next(line for line in _output("rustc", "-vV").splitlines() if line.startswith("host: "))[6:]
    environment = os.environ | {"RUSTFLAGS": COVERAGE, "CARGO_TARGET_DIR": str(BUILD / "target")}
    # A target is named so that build scripts are built without coverage.
    command = ["cargo", "build", "--quiet", "--locked", "--release", "--target", host]
    subprocess.run(command, cwd=ROOT / "fuzz", env=environment, check=True)
    return BUILD / "target" / host / "release/rings"


def fuzz_rings(cases: int, jobs: int, *, racing: bool) -> dict[str, Any]:
    """Run ring cases, with or without a second thread that changes the rings meanwhile."""
    binary = build_rings()
    name = "rings_racing" if racing else "rings"
    corpus = BUILD / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"FUZZ_RACING": "1"} if racing else {})
    start_s = time.monotonic()
    children = []
    for job in range(jobs):
        log = BUILD / f"{name}-{job}.log"
        command = [str(binary), str(corpus), str(SEEDS), f"-runs={_share(cases, jobs, job)}", "-print_final_stats=1"]
        command += [f"-max_len={CASE_BYTES_MAX}", f"-timeout={TIMEOUT_S}", f"-artifact_prefix={BUILD}/{name}-"]
        with log.open("wb") as out:
            children.append((subprocess.Popen(command, env=environment, stdout=out, stderr=out), log))
    failed = [log for child, log in children if child.wait() != 0]
    for log in failed:
        print(f"{name}: a case fails; the end of {log}:\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
    texts = [log.read_text(errors="replace") for _, log in children]
    return {
        "cases": sum(int(count) for text in texts for count in EXECUTED.findall(text)),
        "failed": len(failed),
        "seconds": round(time.monotonic() - start_s, 1),
        "edges_covered": max((int(count) for text in texts for count in COVERED.findall(text)), default=0),
        "corpus_files": len(list(corpus.iterdir())),
    }


def fuzz_messages(cases: int, jobs: int, seed: int) -> dict[str, Any]:
    """Run message cases."""
    start_s = time.monotonic()
    command = [sys.executable, str(ROOT / "fuzz/messages.py"), "--seed", str(seed)]
    share = -(-cases // jobs)
    children = [
        subprocess.Popen(
            [*command, "--first", str(first), "--cases", str(min(share, cases - first))], stdout=subprocess.PIPE
        )
        for first in range(0, cases, share)
    ]
    outputs = [child.communicate()[0] for child in children]
    reports = [json.loads(output) for output in outputs if output]
    return {
        "cases": sum(report["cases"] for report in reports),
        "messages_handled": sum(report["messages_handled"] for report in reports),
        "ends": dict(sum((Counter(report["ends"]) for report in reports), Counter())),
        "failed": sum(child.returncode != 0 for child in children),
        "seconds": round(time.monotonic() - start_s, 1),
        "seed": seed,
    }


def _share(cases: int, jobs: int, job: int) -> int:
    return cases // jobs + (job < cases % jobs)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Run all fuzzers; the exit status says whether every case held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ring-cases", type=int, default=10_000_000)
    parser.add_argument("--racing-cases", type=int, default=100_000)
    parser.add_argument("--message-cases", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the messages; the time if not given")
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    if options.message_cases:
        figures["messages"] = fuzz_messages(options.message_cases, options.jobs, options.seed)
    if options.racing_cases:
        figures["rings_racing"] = fuzz_rings(options.racing_cases, options.jobs, racing=True)
    if options.ring_cases:
        figures["rings"] = fuzz_rings(options.ring_cases, options.jobs, racing=False)
    for part in figures.values():
        part["cases_per_second"] = round(part["cases"] / max(part["seconds"], 0.1))
    ok = not any(part["failed"] for part in figures.values())
    report = {"target": "fuzz", "ok": ok, "jobs": options.jobs, **figures}
    reports = ROOT / "build/reports"
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "fuzz.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
