"""Preparing data on a Ray cluster of two nodes, one of which dies: `python -m benchmarks.ray_nodes --data_path DIR --out DIR [--img_size 256] [--llm_model_name NAME]`.

Both nodes are on this machine, with a core each. As soon as some shards are there, the second one is killed with all its workers. Printed: when, and whether the shards are those of one
process, by their hashes.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from util.files import sha256_of


def hashes(folder: Path) -> dict[str, str]:
    """Of the pictures, and of what stands beside them."""
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted([*folder.glob("shard-*"), *folder.glob("text_cache/*.safetensors")])
        if not path.name.endswith(".part")
    }


def count(folder: Path) -> int:
    return len([*folder.glob("shard-*.tar")])


def encoded(folder: Path) -> int:
    return len([*folder.glob("text_cache/shard-*")])


def prepare(args: argparse.Namespace, out: Path, engine: str) -> subprocess.Popen:
    line = ["--data_path", str(args.data_path), "--out", str(out), "--img_size", str(args.img_size), "--shard_pictures", str(args.shard_pictures)]
    line += ["--llm_model_name", args.llm_model_name] if args.llm_model_name else []
    log = open(args.out / f"{engine}.txt", "w")  # noqa: SIM115
    return subprocess.Popen([sys.executable, "prepare_data.py", *line, "--engine", engine, "--num_workers", "0"], stdout=log, stderr=subprocess.STDOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--shard_pictures", type=int, default=16)
    parser.add_argument("--llm_model_name", help="encodes the captions too, in an actor")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

    if prepare(args, args.out / "one", "processes").wait():
        raise SystemExit("see processes.txt in --out")
    wanted = hashes(args.out / "one")
    say(f"one process has made {count(args.out / 'one')} shards")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    say("a Ray cluster of two nodes is up")
    driver = prepare(args, args.out / "ray", "ray")
    while count(args.out / "ray") < min(3, count(args.out / "one") - 1) and driver.poll() is None:
        time.sleep(0.05)
    say(f"{count(args.out / 'ray')} shards are there, {encoded(args.out / 'ray')} with features; the second node is killed")
    cluster.remove_node(second, allow_graceful=False)
    code = driver.wait()
    found = hashes(args.out / "ray")
    say(
        f"prepare_data.py has ended with {code}; shards: {count(args.out / 'ray')}, with features: {encoded(args.out / 'ray')}; the same to the byte: {found == wanted}"
    )
    cluster.shutdown()
    sys.exit(found != wanted)


if __name__ == "__main__":
    main()
