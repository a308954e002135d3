"""A training step on two machines against the same step in one process: `cluster/torchrun.sh`, gloo, dropout on, the
demo's sizes.

    sudo .venv/bin/python -m bench.nodes      # in the repository root; needs the right to make network namespaces

The machines are two network namespaces with a cable (veth) between them: no shared loopback, an address each. Last
line: `RESULT nodes=2 gradient_error=... loss_error=...`, relative, the larger of both machines; exit 1 above 1e-6.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES, ADDRESSES, PORT = ("colintern-a", "colintern-b"), ("10.213.7.1", "10.213.7.2"), "29533"
COUNTS = (1, 3, 2, 1)  # tiles of the batch's pages


def command(text: str) -> None:
    subprocess.run(text.split(), check=True)


def connect() -> None:
    for name in NAMES:
        command(f"ip netns add {name}")
    command(f"ip link add cable netns {NAMES[0]} type veth peer name cable netns {NAMES[1]}")
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        command(f"ip -n {name} addr add {address}/24 dev cable")
        for device in ("cable", "lo"):
            command(f"ip -n {name} link set {device} up")


def machine(number: int, folder: str) -> subprocess.Popen[str]:
    run = ["ip", "netns", "exec", NAMES[number], "cluster/torchrun.sh", "-m", "bench.nodes", folder]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env |= {"NODES": "2", "NODE": str(number), "HEAD": ADDRESSES[0], "PORT": PORT}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.Popen(run, env=env, text=True)


def step(folder: str) -> None:
    """In each process: the step of all pages alone, then that of its share; its errors to a file."""
    import torch

    from bench.gpu import TINY, Engine
    from colintern.training.distributed import SINGLE_PROCESS, init_distributed

    torch.set_num_threads(1)
    with init_distributed(1) as own:
        engine = Engine(TINY, "float32", None, folder, "cpu")
        engine.set(micro=1, checkpointing=False, dropout=0.1)
        share = len(COUNTS) // own.world_size
        found = []
        for context, rows in ((SINGLE_PROCESS, slice(None)), (own, slice(own.rank * share, (own.rank + 1) * share))):
            engine.trainer.context = context
            engine.model.zero_grad()
            loss = engine.trainer.training_step(engine.model, engine.batch(COUNTS, rows))
            gradient = torch.cat([p.grad.double().flatten() for p in engine.model.parameters() if p.grad is not None])
            found.append((loss.double(), gradient))
        (loss, whole), (other_loss, shared) = found
        errors = (shared - whole).norm() / whole.norm(), (other_loss - loss).abs() / loss
        Path(folder, f"errors-{own.rank}").write_text(" ".join(str(error.item()) for error in errors))


def main() -> None:
    if sys.argv[1:]:
        step(sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            connect()
            machines = [machine(number, folder) for number in range(2)]
            codes = [one.wait(300) for one in machines]
        finally:
            for name in NAMES:
                subprocess.run(["ip", "netns", "delete", name], check=False)
        if any(codes):
            raise SystemExit(f"the two machines ended with {codes}")
        found = [[float(x) for x in Path(folder, f"errors-{rank}").read_text().split()] for rank in range(2)]
    gradient, loss = map(max, zip(*found, strict=True))
    print(f"RESULT nodes=2 gradient_error={gradient:.1e} loss_error={loss:.1e}")
    if not max(gradient, loss) <= 1e-6:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
