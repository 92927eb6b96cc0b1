"""How long `stratoscope explain` takes on a machine that does other work as well.

    python bench/busy.py            about five minutes; prints a table and writes bench/busy.json

Idle, beside a loop that keeps one core busy, and beside a training job of one thread. The unit is a
forward pass of SmolLM2 on 14 tokens, timed idle. `OMP_WAIT_POLICY=ACTIVE OMP_NUM_THREADS=2` before
the command shows what threads that spin while they wait, torch's own default, would do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROMPT = "When Mary and John went to the store, John gave a drink to"
LOOP = "while True: pass"
TRAINING = """
import torch
torch.set_num_threads(1)
net = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(8)])
step = torch.optim.AdamW(net.parameters())
while True:
    net(torch.randn(256, 512)).square().mean().backward()
    step.step()
    step.zero_grad()
"""
FORWARD = f"""
import time, stratoscope as st
lm, times = st.load("smollm2"), []
for _ in range(12):
    start = time.perf_counter()
    lm({PROMPT!r})
    times.append(time.perf_counter() - start)
print(sorted(times)[6])
"""
TIMES = 2


@contextmanager
def beside(program: str) -> Iterator[None]:
    """Another process at work inside the block; "" for none."""
    worker = subprocess.Popen([sys.executable, "-c", program]) if program else None
    time.sleep(5 if worker else 1)  # it imports torch first
    try:
        yield
    finally:
        if worker is not None:
            worker.kill()
            worker.wait()


def explain() -> float:
    """Seconds of one explanation, loading included."""
    with tempfile.TemporaryDirectory() as folder:
        start = "from stratoscope.cli import main; main()"
        words = [
            "explain",
            PROMPT,
            "--answer",
            " Mary",
            "--foil",
            " John",
            "--out",
            f"{folder}/r.html",
        ]
        began = time.perf_counter()
        command = [sys.executable, "-W", "ignore", "-c", start, *words]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began


def main() -> None:
    forward = float(subprocess.run([sys.executable, "-W", "ignore", "-c", FORWARD], **_TEXT).stdout)
    cases = {"idle": "", "beside a busy loop": LOOP, "beside a training job": TRAINING}
    found: dict[str, float] = {"forward_of_14_tokens": round(forward, 4)}
    for name, program in cases.items():
        with beside(program):
            times = [explain() for _ in range(TIMES)]
        found[name] = round(statistics.median(times), 1)
        ratio = found[name] / found["idle"]
        sys.stdout.write(
            f"{name:42} {found[name]:6.1f} s   {ratio:.2f} x idle   {found[name] / forward:5.0f} "
            "passes\n"
        )
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


_TEXT = {"check": True, "capture_output": True, "text": True}

if __name__ == "__main__":
    main()
