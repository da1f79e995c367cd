"""A quickstart run recorded whole: `.venv/bin/python tests/benchmarks/bench_record.py [--steps 300] [--dir DIR]`.

Runs verl's trainer in the quickstart's task, in alternation without a recording (`relex.record=window`: RELEX lets go after
its cut at 15% of the steps) and with one (`run`), both with a bf16 trajectory and without scores. Prints

- seconds that verl's own timer gives the last two thirds of the steps, medians of the tries and of the pairs' ratio,
- resident memory of the actor's process at the end of every tenth of the run, and its growth over the last two thirds,
- of how many checkpoints that verl saved (a twentieth of the steps apart) `relex-verl checkout` gives the same bits.

Exits with 1 when recording takes more than 1.05 times as long, when the memory of the recorded run grows by more than 2%
and by 16 MB more than that of the run without, or when a bit differs. `--once`: the recorded run alone, for memory and bits.
Wants a machine that does nothing else: results in README.md beside this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"
ACTOR = "WorkerDict"  # in the name that Ray gives the process
MOST_TIMES, MOST_GROWTH, MOST_MORE = 1.05, 1.02, 16e6


def metrics(out: Path) -> dict[int, dict[str, float]]:
    """Training step -> what verl logged."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    logged = {}
    for line in lines:
        if line.endswith("}"):
            entry = json.loads(line)
            logged[entry["step"]] = entry["data"]
    return logged


def actor_memory(parent: int) -> int | None:
    """Bytes resident in the actor's process below this one."""
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if ACTOR in " ".join(process.cmdline()):
                return process.memory_info().rss
        except psutil.Error:
            continue
    return None


def run(out: Path, steps: int, record: str, save: bool) -> dict[int, int]:
    """Train; step -> the actor's memory, looked at while the next one was made."""
    every = max(1, steps // 20)
    command = [
        sys.executable,
        str(QUICKSTART / "quickstart.py"),
        "--steps",
        str(steps),
        "--full",
        "--out",
        str(out),
        "--",
    ]
    command += ["relex.trajectory=bf16", f"relex.record={record}", "relex.validate_targets=false"]
    command += ["trainer.test_freq=-1", "trainer.val_before_train=False", "trainer.logger=[console,file]"]
    command += [f"trainer.save_freq={every if save else -1}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    memory: dict[int, int] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(1.0)
            step = max(metrics(out), default=0)
            resident = actor_memory(process.pid)
            if step and resident is not None:
                memory[step] = resident
            if step == steps:
                break  # what follows is scoring, in other processes
        code = process.wait()
    if max(metrics(out), default=0) < steps:
        raise SystemExit(f"{out.name} ended with {code} before its last step: see {log.name}")
    if not memory:
        raise SystemExit(f"no process below {out.name} has {ACTOR} in its name: its memory was not seen")
    return memory


def seconds(out: Path, steps: int) -> float:
    """Of the last two thirds, saving left out."""
    logged = metrics(out)
    late = range(steps - 2 * steps // 3 + 1, steps + 1)
    return sum(logged[step]["timing_s/step"] - logged[step].get("timing_s/save_checkpoint", 0.0) for step in late)


def differing(out: Path) -> dict[int, int]:
    """Step of each of verl's checkpoints -> elements of bfloat16 that `relex-verl checkout` gives otherwise."""
    found = {}
    command = [sys.executable, "-m", "relex_verl", "checkout", str(out / "relex" / "trajectory")]
    for folder in sorted((out / "checkpoints").glob("global_step_*"), key=lambda path: int(path.name.split("_")[-1])):
        step, given = int(folder.name.split("_")[-1]), out / "given"
        subprocess.run([*command, "--step", str(step), "--out", str(given)], check=True, stdout=subprocess.DEVNULL)
        ours = load_file(given / "model.safetensors")
        theirs = {}
        for path in (folder / "actor" / "huggingface").glob("*.safetensors"):
            theirs |= load_file(path)
        if not theirs or not theirs.keys() <= ours.keys():
            raise SystemExit(f"{folder} holds {sorted(theirs)[:3]} ..., the checkout {sorted(ours)[:3]} ...")
        found[step] = sum(
            int((ours[name].view(torch.int16) != theirs[name].to(torch.bfloat16).view(torch.int16)).sum())
            for name in theirs
        )
        shutil.rmtree(given)
    return found


def growth(memory: dict[int, int], steps: int) -> tuple[int, int]:
    """Resident bytes after the first third, and at the end."""
    early = min((step for step in memory if step >= steps // 3), default=max(memory))
    return memory[early], memory[max(memory)]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="only the recorded run: memory and bits")
    parser.add_argument("--dir", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    root = chosen.dir or Path(tempfile.mkdtemp(prefix="bench_record-"))
    times: dict[str, list[float]] = {"window": [], "run": []}
    grown: dict[str, tuple[int, int]] = {}
    for number in range(1 if chosen.once else chosen.tries):
        for record in ("run",) if chosen.once else ("window", "run"):
            out = root / f"{record}_{number}"
            memory = run(out, chosen.steps, record, save=chosen.once)
            times[record].append(seconds(out, chosen.steps))
            grown[record] = growth(memory, chosen.steps)
            tenths = {step: memory[step] for step in sorted(memory) if step % max(1, chosen.steps // 10) == 0}
            shown = ", ".join(f"{step}: {size / 1e6:.0f}" for step, size in tenths.items())
            print(
                f"record={record}, try {number + 1}: {times[record][-1]:.1f} s; actor MB by step: {shown}", flush=True
            )
    return judge(root, times, grown, chosen.once)


def judge(root: Path, times: dict[str, list[float]], grown: dict[str, tuple[int, int]], once: bool) -> int:
    """Print what came of it; 1 where a bound is broken."""
    broken = []
    early, late = grown["run"]
    more = late - early - (grown["window"][1] - grown["window"][0] if "window" in grown else 0)
    print(f"recorded: {early / 1e6:.0f} MB after a third of the steps, {late / 1e6:.0f} MB at the end")
    if late > MOST_GROWTH * early and more > MOST_MORE:
        broken.append(f"memory grows by {(late - early) / 1e6:.0f} MB")
    if once:
        wrong = differing(root / "run_0")
        print(
            f"{len(wrong)} of verl's checkpoints compared, steps {sorted(wrong)}; differing elements: {sum(wrong.values())}"
        )
        broken += [f"{sum(wrong.values())} elements differ"] if sum(wrong.values()) or not wrong else []
    else:
        ratio = median(one / other for one, other in zip(times["run"], times["window"], strict=True))
        print(f"{median(times['run']):.1f} s against {median(times['window']):.1f} s, {ratio:.3f} times as long")
        broken += [f"{ratio:.3f} times as long is more than {MOST_TIMES}"] if ratio > MOST_TIMES else []
    print("; ".join(broken) or "within all bounds")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
