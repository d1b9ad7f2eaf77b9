"""Step 3: pairs per second of the training loop, against the bare matrix products and against the published loop.

The bare products of a batch are those that every training needs: z = f A^T, h = z B_pd^T, p = h W_hd^T
forward; dh = p W_hd, dB_pd = dh^T z, dz = dh B_pd, dA = dz^T f backward; in the same dtype, on the same batch sizes,
into buffers that are allocated once. There is nothing else: no dropout, no softmax, no loss, no optimizer, no reading,
and not the two products with B_rct, which preset `paper` also needs.

pema's loop is `pema.adapter.joint`'s own, from the memory on disk: reading, shuffling, dropout, loss, gradients,
clipping, optimizer, log. The published loop is the reimplementation in `published.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pema.adapter.checkpoint import Checkpoint
from pema.adapter.config import TrainConfig
from pema.adapter.joint import JointRun
from pema.adapter.loss import CrossEntropy
from pema.adapter.reconstruction import closed_form
from pema.devices import has_bfloat16
from pema.memory.reader import Memory
from reproduction.benchmarks.inputs import TIMED, rows_of, synthetic_memory
from reproduction.benchmarks.options import Options, Shape
from reproduction.benchmarks.published import PublishedAdapter, Rows, train_joint
from reproduction.benchmarks.timing import Run, alternate, breakdown, paired_ratio, rate, row, significant, timing

AIM, AIM_ON_ACCELERATOR = ">= 0.7", ">= 0.5"


class Loop:
    """The training loop of pema on all pairs of a memory, one pass at a time."""

    def __init__(self, memory: Memory, config: TrainConfig, folder: Path, device: str = "cpu") -> None:
        # The measurement ends long before the schedule: the learning rate does not change the cost of a step.
        config = replace(config.fitted(memory.d), dev_fraction=0.0, epochs=10_000, device=device)
        shutil.rmtree(folder, ignore_errors=True)
        digest = str(memory.manifest.to_dict()["digest"])
        self.run = JointRun(memory, config, folder, Checkpoint(folder, config, digest), tensorboard=False)
        self.config = config

    def a_pass(self) -> None:
        """Process every pair once."""
        self.run.epoch(lambda *_args, **_note: None)
        self.run.state.epoch, self.run.state.batch = self.run.state.epoch + 1, 0


class Products:
    """Bare matrix products of one pass over f (n, d), on the device of W_hd."""

    def __init__(self, f: Tensor, W_hd: Tensor, rank: int, batch_size: int, dtype: torch.dtype) -> None:
        (_, d), V = f.shape, W_hd.shape[0]
        device = W_hd.device
        self.batches = [rows.to(device, dtype) for rows in torch.split(f, batch_size)]
        self.W_hd = W_hd.to(dtype)
        self.A, self.B_pd = torch.randn(rank, d).to(device, dtype), torch.randn(d, rank).to(device, dtype)
        self.dA, self.dB_pd = torch.empty_like(self.A), torch.empty_like(self.B_pd)
        widths = {"z": rank, "h": d, "p": V, "dh": d, "dz": rank}
        self.buffers = {k: torch.empty(batch_size, width, dtype=dtype, device=device) for k, width in widths.items()}

    @torch.no_grad()
    def a_pass(self) -> None:
        """Process every pair once."""
        for f in self.batches:
            z, h, p, dh, dz = (buffer[: len(f)] for buffer in self.buffers.values())
            torch.mm(f, self.A.T, out=z)
            torch.mm(z, self.B_pd.T, out=h)
            torch.mm(h, self.W_hd.T, out=p)
            torch.mm(p, self.W_hd, out=dh)
            torch.mm(dh.T, z, out=self.dB_pd)
            torch.mm(dh, self.B_pd, out=dz)
            torch.mm(dz.T, f, out=self.dA)


def published_loop(options: Options, memory: Memory, folder: Path) -> tuple[Callable[[], float], int]:
    """Return the published loop for some batches, with rank and kappa of preset `paper`, and its number of pairs."""
    config = TIMED["paper"].fitted(memory.d)
    A, B_rct, _ = closed_form(memory.view(), config.rank, memory.d)
    del A
    head = memory.head()
    files = folder / f"rows-{memory.d}.f32", folder / f"rows-{memory.d}.i32"
    if not files[1].exists():
        batches = list(memory.view().batches(8192))
        torch.cat([batch.representations for batch in batches]).numpy().tofile(files[0])
        torch.cat([batch.targets for batch in batches]).numpy().astype(np.int32).tofile(files[1])
    rows = Rows(*files, memory.d)
    W_hd = head.weight.float()
    adapter = PublishedAdapter(memory.d, config.rank)
    # The published scaling by 1 / r belongs to A, so that the input of B_rct is as large as in the closed form.
    B_rct = B_rct * config.rank
    size, steps = options.published_batch, options.published_steps

    def loop() -> float:
        return train_joint(rows, adapter, B_rct, W_hd, config.kappa, steps, size)

    starts = list(range(0, len(rows), size))
    return loop, sum(min(size, len(rows) - starts[k % len(starts)]) for k in range(steps))


def run(options: Options, folder: Path) -> dict[str, Any]:
    """Measure both presets at every shape."""
    results = [at_shape(options, shape, folder) for shape in options.shapes]
    return {"summary": [line for result in results for line in result.pop("summary")], "shapes": results}


def at_shape(options: Options, shape: Shape, folder: Path) -> dict[str, Any]:
    """Measure both presets at one shape."""
    torch.manual_seed(options.seed)
    memory = synthetic_memory(options, shape, folder)
    device = torch.device(options.device)
    f, W_hd = rows_of(memory.view()), memory.head().weight.to(device).float()
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    result: dict[str, Any] = {"name": shape.name, "d": shape.d, "V": shape.V, "pairs": memory.pairs}
    aim = AIM if device.type == "cpu" else AIM_ON_ACCELERATOR
    result |= {"dtype": str(dtype).removeprefix("torch."), "presets": {}, "summary": []}
    published, published_pairs = None, 0
    if device.type == "cpu":
        published, published_pairs = published_loop(options, memory, folder)
    for name, preset in TIMED.items():
        loop = Loop(memory, preset, folder / f"joint-{shape.d}-{name}", options.device)
        config = loop.config
        products = Products(f, W_hd, config.rank, config.batch_size, dtype)
        runs: dict[str, Run] = {"pema": loop.a_pass, "bare products": products.a_pass}
        if name == "paper" and published is not None:
            runs["published loop"] = published
        times = alternate(runs, options.repeats)
        pairs = {"pema": memory.pairs, "bare products": memory.pairs, "published loop": published_pairs}
        measured = {variant: rate(pairs[variant], "pairs", t) for variant, t in times.items()}
        share = paired_ratio(times["bare products"], times["pema"])
        of = f"preset {name}, d {shape.d}, r {config.rank}"
        per_second = measured["pema"]["pairs_per_second"]
        result["summary"].append(row(of, per_second, "pairs/s", "bare products", share, aim))
        if "published loop" in runs:
            faster = per_second / measured["published loop"]["pairs_per_second"]
            result["summary"].append(row(of, per_second, "pairs/s", "published loop", faster, ""))
        result["presets"][name] = {
            "rank": config.rank,
            "batch_size": config.batch_size,
            "measured": measured,
            "share_of_bare_products": share,
            "where_it_goes": {"a pass, profiled": breakdown(loop.a_pass)},
        }
        if device.type == "cpu":  # an accelerator does not carry out one stage after the other
            alone = stages(loop, products, memory, times, options.repeats)
            result["presets"][name]["where_it_goes"]["seconds of a pass, each alone"] = alone
        if "published loop" in runs:
            result["presets"][name]["published_batch_size"] = options.published_batch
            result["presets"][name]["published_pairs"] = published_pairs
            result["presets"][name]["times_the_published_loop"] = significant(faster)
        loop.run.log.close()
    return result


def stages(
    loop: Loop, products: Products, memory: Memory, passes: dict[str, list[float]], repeats: int
) -> dict[str, float]:
    """Return the seconds of each stage of one pass alone; `other` is the rest of the pass."""
    config, steps = loop.config, len(products.batches)
    f = products.batches[0].float()
    y = next(memory.view().batches(len(f))).targets
    assert isinstance(loop.run.loss.cross_entropy, CrossEntropy)
    cross_entropy, buffer = loop.run.loss.cross_entropy, products.buffers["p"][: len(f)]
    h = torch.randn_like(f)

    def softmax_products() -> None:
        torch.mm(products.batches[0], products.W_hd.T, out=buffer)
        torch.mm(buffer, products.W_hd)

    def optimise() -> None:
        if config.clip:
            torch.nn.utils.clip_grad_norm_(loop.run.parameters.values(), config.clip)
        loop.run.optimizer.step()

    def dropped() -> None:
        drop = loop.run.dropout.at(0)
        if drop is not None:
            drop(f)

    with torch.no_grad():
        one: dict[str, Run] = {
            "cross-entropy": lambda: cross_entropy.sweep(h, y, True),
            "its products": softmax_products,
            "dropout": dropped,
            "clipping and optimizer": optimise,
        }
        one["reading and shuffling"] = lambda: [
            len(batch.targets) for batch in memory.view().batches(config.batch_size, shuffle_seed=0)
        ]
        times = alternate(one, repeats, warm_up=2) | passes
    median = {name: timing(t)["median_seconds"] for name, t in times.items()}
    spent = {
        "bare products": median["bare products"],
        "softmax and loss": max(0.0, median["cross-entropy"] - median["its products"]) * steps,
        "dropout": median["dropout"] * steps,
        "clipping and optimizer": median["clipping and optimizer"] * steps,
        "reading and shuffling": median["reading and shuffling"],
    }
    spent["other"] = median["pema"] - sum(spent.values())
    return {name: significant(value) for name, value in spent.items()}


def parts(options: Options, folder: Path) -> dict[str, Run]:
    """Return the parts to run in separate processes for their peak memory."""
    shape = options.shapes[0]

    def preset(name: str) -> Run:
        def one() -> None:
            memory = Memory.open(folder / f"synthetic-{shape.d}-{shape.V}")
            Loop(memory, TIMED[name], folder / f"peak-{name}").a_pass()

        return one

    def published() -> None:
        loop, _ = published_loop(options, Memory.open(folder / f"synthetic-{shape.d}-{shape.V}"), folder)
        loop()

    return {f"preset {name}": preset(name) for name in TIMED} | {"published loop": published}
