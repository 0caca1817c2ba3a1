"""The one training loop: batches in, a Step's loss out, optimizer, clamp, log, evaluate, checkpoint.

Everything that decides a step is a pure function of the seed and the step number: which pairs, which
captions, which augmentation, and the random numbers inside the model. Resuming needs the weights, the
optimizer and one integer. The budget is steps, epochs or minutes; progress through it, agreed by all ranks,
drives the learning rate.
"""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from clipkit.errors import ClipkitError
from clipkit.models import build_model, seeded
from clipkit_data.batches.loader import Batch
from clipkit_data.batches.lost_workers import explaining_lost_workers
from clipkit_data.batches.quarantine import FILE as QUARANTINE
from clipkit_data.batches.quarantine import BadSample, read_quarantine, write_quarantine
from clipkit_training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from clipkit_training.data import TrainingData
from clipkit_training.judge import live_judge, warn_of_collapse
from clipkit_training.log import RunLog
from clipkit_training.optim import build_optimizer, learning_rate
from clipkit_training.precision import autocast, resolve_precision
from clipkit_training.recipe import Recipe
from clipkit_training.steps import Setting, Step, build_step
from clipkit_training.world import World

HEADS = 1  # key of the weights that a Step adds to the model


@dataclass
class Budget:
    """How far a run is, in [0, 1], by whichever of its limits is nearest."""

    max_steps: int | None
    max_seconds: float | None
    spent_before: float
    started: float
    reserve: float = 0.0
    """Seconds that the slowest step so far took, its evaluation and checkpoint included: the last step must
    fit into the budget."""

    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.spent_before + time.monotonic() - self.started

    def progress(self, step: int) -> float:
        """The share of the budget spent after `step` steps."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = (self.seconds() + self.reserve) / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(by_steps, by_time))


class Trainer:
    """One run of a recipe in a run folder."""

    def __init__(self, recipe: Recipe, run: Path, world: World) -> None:
        self.recipe, self.run, self.world = recipe, run, world
        self.model = build_model(recipe.model, seed=recipe.seed).to(world.device)
        self.data = TrainingData(recipe, self.model, world)
        self.method = self._method()
        self.parallel = self.method if world.group is None else _parallel(self.method, world.group)
        self.optimizer = build_optimizer(self.method, recipe.optim)
        self.precision = resolve_precision(recipe.precision, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == "fp16")
        self.judge = live_judge(recipe, self.model) if world.main else None
        self.step = 0
        self.spent = 0.0
        self.warm = 0.0  # progress at the end of the warm-up
        self.bad: list[BadSample] = []

    def _method(self) -> Step:
        """The recipe's Step around the model; what it adds has weights from the recipe's seed too."""
        recipe, world = self.recipe, self.world
        batch_size, samples = recipe.data.batch_size, self.data.samples
        setting = Setting(world.group, batch_size, self._max_steps(), samples, world.device, recipe.seed)
        with seeded(_seed_of(recipe.seed, HEADS)):
            return build_step(self.model, recipe.step, setting).to(world.device)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        newest = newest_checkpoint(self.run) if self.world.main else None
        folder = self.world.gather(newest)[0]  # one rank chooses: another may see an older state of the disk
        if folder is None:
            return
        state = load_checkpoint(folder, self.method, self.optimizer)
        self.data.check(state["order"], self.run)
        self.bad = read_quarantine(folder / QUARANTINE)
        self.step, self.spent, self.warm = state["step"], state["seconds"], state.get("warm", 0.0)
        self.scaler.load_state_dict(state["scaler"])

    def train(self) -> dict[str, Any]:
        """Train until the budget is spent. Returns what the run cost and how it ended."""
        data, world, first = self.recipe.data, self.world, self.step
        self.loader = self.data.batches(first, self.bad)
        if world.main:
            self.data.write_description(self.run, first=not first)
        budget = Budget(self._max_steps(), self._max_seconds(), self.spent, time.monotonic())
        with ExitStack() as stack:
            stack.enter_context(explaining_lost_workers())
            records = RunLog.open(self.run, first, "training") if world.main else nullcontext()
            self._steps(iter(self.loader), budget, stack.enter_context(records))
        before, self.spent = self.spent, budget.seconds()
        taken = (self.step - first) * data.batch_size
        self._write_quarantine(self.run)
        return {
            "steps": self.step,
            "pairs": self.step * data.batch_size,
            "seconds": round(self.spent, 2),
            "pairs_per_second": round(taken / max(self.spent - before, 1e-9), 1),
            "precision": self.precision,
            "processes": world.size,
            "faults": self.data.left_out(self.bad),
        }

    def _write_quarantine(self, folder: Path) -> None:
        """Bring the bad samples of all processes together and write them; every process calls this."""
        everywhere = self.world.gather(list(self.loader.quarantine.samples.values()))
        latest_first = sorted(chain(*everywhere), key=lambda bad: -bad.step)  # another rank may be the first
        self.bad = list({bad.id: bad for bad in latest_first}.values())
        if self.world.main:
            write_quarantine(folder / QUARANTINE, self.bad)

    def _steps(self, batches: Iterator[Batch], budget: Budget, log: RunLog | None) -> None:
        first = self.step
        done = self.world.agree(budget.progress(self.step))
        evaluated = math.floor(done * self.recipe.evaluations)
        saved = math.floor(done * self.recipe.checkpoints)
        while done < 1:
            started = budget.seconds()
            batch = next(batches)
            loaded = budget.seconds()
            samples = self.world.sum(batch.checksum())
            record: dict[str, Any] = self._one_step(batch, done)
            stepped = budget.seconds()
            self.step += 1
            done = self.world.agree(budget.progress(self.step))
            if log:
                record |= {
                    "samples": f"{samples:016x}",
                    "samples_per_second": round(self.recipe.data.batch_size / (stepped - started), 1),
                    "loading": round((loaded - started) / (stepped - started), 3),
                    "seconds": round(stepped, 3),
                }
                log.step(self.step, done, record | self.data.epochs(self.step))
            if (due := math.floor(done * self.recipe.evaluations)) > evaluated:
                evaluated = due
                if log:
                    warn_of_collapse(record, f"step {self.step}: the embeddings of the batch")
                if log and self.judge:
                    log.evaluation(self.step, done, *self.judge())
            if (due := math.floor(done * self.recipe.checkpoints)) > saved:
                saved = due
                self._save(budget)
            if self.step > first + 1:  # the first step also starts the loader
                budget.reserve = max(budget.reserve, budget.seconds() - started)

    def _one_step(self, batch: Batch, done: float) -> dict[str, float]:
        recipe = self.recipe
        batch = batch.to(self.world.device)
        if recipe.data.augment_on == "device" and self.data.augment is not None:
            batch = batch.augmented(self.data.augment, recipe.seed)
        if self.step <= recipe.optim.warmup_steps:
            self.warm = done
        rate = learning_rate(recipe.optim, self.step, done, self.warm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1)
        torch.manual_seed(_seed_of(recipe.seed, self.step, self.world.rank))
        self.parallel.train()
        with autocast(self.precision, self.world.device):
            loss, metrics = self.parallel(batch)
        if not torch.isfinite(loss):
            raise ClipkitError(
                f"the loss is {loss.item()} at step {self.step}",
                hint="lower optim.lr, or use precision: fp32; earlier checkpoints are kept",
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        limit = recipe.optim.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.method.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step()
        return {
            **{name: round(float(value), 6) for name, value in metrics.items()},
            "lr": rate,
            "grad_norm": norm.item(),
            "epoch": batch.epoch,
        }

    def _max_steps(self) -> int | None:
        limits = [self.recipe.max_steps]
        if self.recipe.max_epochs is not None:
            limits.append(math.ceil(self.recipe.max_epochs * self.data.samples / self.recipe.data.batch_size))
        return min((limit for limit in limits if limit is not None), default=None)

    def _max_seconds(self) -> float | None:
        return self.recipe.max_minutes * 60 if self.recipe.max_minutes else None

    def _save(self, budget: Budget) -> None:
        self._write_quarantine(self.run)
        if self.world.main:
            state = {
                "step": self.step,
                "seconds": budget.seconds(),
                "warm": self.warm,
                "order": self.data.digest,
                "scaler": self.scaler.state_dict(),
            }
            save_checkpoint(self.run, self.step, self.method, self.optimizer, state, self.bad)
        self.world.barrier()


def _parallel(method: Step, group: ProcessGroup) -> DistributedDataParallel:
    """The Step with gradients averaged over a group."""
    with warnings.catch_warnings():
        # Each rank keeps its buffers: nothing in training reads running statistics. What torch 2.13 has
        # for it still copies those of rank 0 at the start, and older versions lack it.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(method, process_group=group, broadcast_buffers=False)


def _seed_of(*key: int) -> int:
    """A seed for torch that depends on every number of the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
