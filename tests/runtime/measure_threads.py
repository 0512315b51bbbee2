"""Images a second of one training rank beside busy processes, for each way its threads wait for each other.

    python tests/runtime/measure_threads.py [--threads 2] [--seconds 10] [--repetitions 3] [--busy 2]

Every turn is a process of its own on the first THREADS cores: OpenMP reads its variables once. "busy" is an
endless loop on the same cores.
"""

import argparse
import os
import statistics
import subprocess
import sys

RANK = """
import sys, time, timm, torch
threads, seconds = int(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=64)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images = torch.randn(64, 3, 32, 32)
begin, done, warm = time.monotonic(), 0, False
while not warm or time.monotonic() - begin < seconds:
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    done += len(images)
    if not warm and time.monotonic() - begin > 2:
        begin, done, warm = time.monotonic(), 0, True
print(done / (time.monotonic() - begin))
"""
WAYS = {"as torch comes": {}, "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"}}


def measure(variables, threads, seconds, busy):
    """Images a second beside `busy` endless loops."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", RANK, str(threads), str(seconds)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--busy", type=int, default=2, help="beside 0 to so many endless loops")
    asked = parser.parse_args()
    os.environ.pop("OMP_WAIT_POLICY", None)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.threads])
    beside = range(asked.busy + 1)
    speeds = {way: [[] for _ in beside] for way in WAYS}
    for _ in range(asked.repetitions):
        for way, variables in WAYS.items():
            for busy in beside:
                found = measure(variables, asked.threads, asked.seconds, busy)
                print(f"{way}, {busy} busy: {found:.0f}", file=sys.stderr, flush=True)
                speeds[way][busy].append(found)
    print(f"{'busy loops':24}" + "".join(f"{busy:10}" for busy in beside) + "   images/s, medians")
    for way, found in speeds.items():
        print(f"{way:24}" + "".join(f"{statistics.median(each):10.0f}" for each in found))


if __name__ == "__main__":
    main()
