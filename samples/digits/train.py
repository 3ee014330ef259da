"""Train the sample: patches first, then patches and twelve questions a scene together."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from network import make_model, save
from packed import Batch, Packed, answer_loss, make_batch, patch_loss
from questions import KINDS, ask
from scenes import make
from torch import Tensor

EACH = 2
MUON = 15  # Muon's rate over AdamW's: updates of the same size
Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Plan:
    """When what happens; the rate rises, stays, and falls to zero over the last ``cooling``."""

    steps: int
    patches_only: int
    cooling: int
    warmup: int = 100

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` as a share of the peak."""
        rise = (step + 1) / self.warmup
        restart = (step + 1 - self.patches_only) / self.warmup if step >= self.patches_only else 1.0
        return max(0.0, min(1.0, rise, restart, (self.steps - step) / max(1, self.cooling)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--patches-only", type=int, default=500, help="first steps, tower alone")
    parser.add_argument("--cooling", type=int, default=1000, help="last steps, rate falling to 0")
    parser.add_argument("--batch", type=int, default=32, help="scenes a step")
    parser.add_argument("--peak", type=float, default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that share a batch")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.state.pt")
    parser.add_argument("--compile", action="store_true", help="torch.compile: slower to start")
    return parser.parse_args()


def optimizers(packed: Packed, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for what is embedded, classified or scaled."""
    named = list(packed.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and not is_outer(name)]
    outer = [p for name, p in named if p.ndim != 2 or is_outer(name)]
    return [
        torch.optim.Muon(inner, lr=MUON * peak, weight_decay=0.05),
        torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def is_outer(name: str) -> bool:
    """Whether a matrix faces tokens, patches or classes rather than hidden states."""
    return "embed" in name or "head" in name


def batch_of(seed: int, step: int, size: int, held_out: bool = False) -> Batch:
    """The scenes of one step, with two questions of each kind."""
    scenes = make("held_out" if held_out else "train", seed, step, size)
    return make_batch(scenes, ask(scenes, seed, step, EACH))


def losses(
    packed: Packed, forwards: tuple[Forward, Forward], batch: Batch, ask_too: bool
) -> dict[str, Tensor]:
    """Weighted losses by name; while only patches are learned, theirs alone."""
    features, decode = forwards
    with torch.autocast("cpu", torch.bfloat16):
        seen = features(batch.pixels)
        found = {"patches": 0.5 * patch_loss(packed.patch_head(seen), batch.patches)}
        if ask_too:
            logits = decode(seen, batch.tokens)
            found["answers"] = answer_loss(logits, batch.targets)
            found["hints"] = 0.5 * answer_loss(logits, batch.hints)
    return found


@torch.no_grad()
def accuracy(packed: Packed, seed: int, size: int = 128) -> dict[str, float]:
    """Share of held-out questions with every answer token right, by kind."""
    batch = batch_of(seed, 0, size, held_out=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = packed(packed.features(batch.pixels), batch.tokens)
    right = (logits.argmax(-1) == batch.targets) | (batch.targets < 0)
    whole = right.view(size, len(KINDS), EACH, -1).all(-1).float().mean((0, 2))
    return dict(zip(KINDS, whole.tolist(), strict=True)) | {"all": whole.mean().item()}


def load_state(packed: Packed, optims: list[torch.optim.Optimizer], file: Path) -> int:
    """Take up a checkpoint; the next step's number."""
    state: dict[str, Any] = torch.load(file, weights_only=True)
    packed.load_state_dict(state["packed"])
    for optim, saved in zip(optims, state["optimizers"], strict=True):
        optim.load_state_dict(saved)
    return int(state["step"])


def keep(packed: Packed, optims: list[torch.optim.Optimizer], step: int, out: Path) -> None:
    """Write the checkpoint folder, and beside it what ``--resume`` needs."""
    save(packed.model, out)
    saved = [optim.state_dict() for optim in optims]
    state = {"packed": packed.state_dict(), "optimizers": saved, "step": step}
    beside = state_file(out).with_suffix(".tmp")
    torch.save(state, beside)
    beside.replace(state_file(out))


def state_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.state.pt")


def join(rank: int, workers: int, meeting: Path) -> None:
    """Meet the other workers; one exchange a step bears a busy machine, many threads do not."""
    if workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers
        )


def share_gradients(packed: Packed, workers: int) -> None:
    """Replace each gradient by its mean over the workers."""
    if workers == 1:
        return
    grads = [p.grad for p in packed.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = (flat / workers).split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def run(rank: int, args: argparse.Namespace, meeting: Path) -> None:
    torch.set_num_threads(args.threads)
    join(rank, args.workers, meeting)
    packed = Packed(make_model(args.seed))
    optims = optimizers(packed, args.peak)
    peaks = [optim.param_groups[0]["lr"] for optim in optims]
    plan = Plan(args.steps, min(args.patches_only, args.steps // 2), args.cooling)
    first = load_state(packed, optims, state_file(args.out)) if args.resume else 0
    forwards: tuple[Forward, Forward] = (packed.features, packed.forward)
    if args.compile:
        forwards = torch.compile(packed.features), torch.compile(packed.forward)
    start = time.monotonic()
    for step in range(first, args.steps):
        for optim, peak in zip(optims, peaks, strict=True):
            optim.param_groups[0]["lr"] = peak * plan.rate(step)
        batch = batch_of(args.seed, step * args.workers + rank, args.batch // args.workers)
        found = losses(packed, forwards, batch, step >= plan.patches_only)
        packed.zero_grad()
        sum(found.values(), torch.zeros(())).backward()
        share_gradients(packed, args.workers)
        torch.nn.utils.clip_grad_norm_(packed.parameters(), 1.0)
        for optim in optims:
            optim.step()
        if rank > 0:
            continue
        if step % 20 == 0:
            spent = time.monotonic() - start
            shown = " ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"{step} {spent:.0f}s {shown}", flush=True)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            keep(packed, optims, step + 1, args.out)
            print(json.dumps({"step": step + 1} | accuracy(packed, args.seed)), flush=True)


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        if args.workers == 1:
            run(0, args, meeting)
        else:
            processes.spawn(run, (args, meeting), args.workers)


if __name__ == "__main__":
    main()
