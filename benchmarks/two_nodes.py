"""Two machines on one: `python -m benchmarks.two_nodes --out DIR [--parallel hsdp --processes 2]` (as root, for network namespaces).

Two torchrun agents, each in a network namespace with an address of its own, meet by rendezvous and train. One of them is killed with all its processes; the other one waits for it.
It is started again, and they go on. Printed: what happened when, and whether the end is that of as many processes on one machine, to the bit; hsdp's is near that of fsdp,
since its gradients are summed in another order.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.kill_test import BATCH, equal, family, kill, largest_difference, make_inputs, step_of
from util import checkpoint

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("jit-a", "jit-b")
DEVICES = ("jit0", "jit1")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect() -> None:
    """Two namespaces with a cable between them."""
    for name in NAMES:
        ip("netns", "add", name)
    ip("link", "add", DEVICES[0], "netns", NAMES[0], "type", "veth", "peer", "name", DEVICES[1], "netns", NAMES[1])
    for name, device, address in zip(NAMES, DEVICES, ADDRESSES):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
        for one in (device, "lo"):
            ip("-n", name, "link", "set", one, "up")


def disconnect() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def flags(args: argparse.Namespace, run: Path, parallel: str) -> list[str]:
    found = ["--model", "JiT-Nano/8-Text", "--img_size", "16", "--device", "cpu", "--num_workers", "0", "--batch_size", str(BATCH // (2 * args.processes))]
    found += ["--data_path", str(args.out / "data"), "--llm_model_name", str(args.out / "llm"), "--output_dir", str(run), "--resume", str(run)]
    return [*found, "--lr", "1e-3", "--save_freq_steps", "10", "--log_freq", "10", "--parallel", parallel, "--epochs", str(args.epochs)]


def agent(number: int, args: argparse.Namespace, run: Path) -> subprocess.Popen:
    """torchrun on one of the machines."""
    meeting = ["--nnodes=2", f"--nproc_per_node={args.processes}", "--rdzv_backend=c10d", "--rdzv_id=two", f"--rdzv_endpoint={ADDRESSES[0]}:29500"]
    meeting += [f"--rdzv_conf=is_host={int(number == 0)}", "--max-restarts=3"]  # they have one host name, by which torchrun would know
    line = ["ip", "netns", "exec", NAMES[number], sys.executable, "-m", "torch.distributed.run", *meeting, f"--local-addr={ADDRESSES[number]}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": DEVICES[number], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = open(args.out / f"{NAMES[number]}.txt", "a")  # noqa: SIM115
    return subprocess.Popen([*line, "main_jit.py", *flags(args, run, args.parallel)], stdout=log, stderr=subprocess.STDOUT, env=environment)


def wait_for_step(run: Path, step: int, agents: list[subprocess.Popen]) -> None:
    while step_of(run) < step:
        if any(one.poll() for one in agents):
            raise SystemExit("an agent ended; see its .txt in --out")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "hsdp"), default="ddp")
    parser.add_argument("--processes", type=int, default=1, help="of a node")
    parser.add_argument("--epochs", type=int, default=10, help="of 16 steps")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    make_inputs(args.out)
    whole, killed = args.out / "whole", args.out / "killed"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={2 * args.processes}", "main_jit.py"]
    line += flags(args, whole, "fsdp" if args.parallel == "hsdp" else args.parallel)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

    disconnect()
    connect()
    try:
        agents = [agent(number, args, killed) for number in (0, 1)]
        wait_for_step(killed, 20, agents)
        say(f"both have met at {ADDRESSES[0]}, and saved step {step_of(killed)}")
        for pid in family(agents[1].pid):
            kill(pid)
        agents[1].wait()
        say(f"{ADDRESSES[1]} is killed, all of it")
        time.sleep(10)
        assert agents[0].poll() is None
        say(f"{ADDRESSES[0]} waits for it, at step {step_of(killed)}")
        agents[1] = agent(1, args, killed)
        before = step_of(killed)
        wait_for_step(killed, before + 10, agents)
        say(f"{ADDRESSES[1]} is back, and step {step_of(killed)} is saved")
        codes = [one.wait() for one in agents]
        say(f"both have ended, with {codes}")
    finally:
        for one in agents:
            if one.poll() is None:
                one.send_signal(signal.SIGKILL)
        disconnect()
    print(*re.findall(r"resumed \S+ next epoch.*", (args.out / "jit-a.txt").read_text()), sep="\n")
    a, b = (checkpoint.load(run / checkpoint.LAST) for run in (whole, killed))
    print(f"steps: {a['step']} and {b['step']}; equal to the bit: {equal(a, b)}; largest difference: {largest_difference(a, b):.1e}")


if __name__ == "__main__":
    main()
