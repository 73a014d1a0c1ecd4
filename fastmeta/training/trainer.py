"""The training loop: one step, read from top to bottom, and the state that continues it bit for bit."""

import contextlib
import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.capture import last_linear
from fastmeta.data import generator_for
from fastmeta.ops.process_group import sum_over
from fastmeta.ssl import Algorithm, Refiner, StepLoss, TrainingBatch
from fastmeta.ssl.base import frozen_statistics
from fastmeta.training.batches import Batches, TrainingData
from fastmeta.training.config import AverageConfig, MachineConfig, OptimizerConfig, ScheduleConfig
from fastmeta.training.ema import ExponentialMovingAverage
from fastmeta.training.label_changes import LabelChanges
from fastmeta.training.machine import (
    capture_steps,
    distributed,
    put_back_,
    refuse_accumulation,
    refuse_compile,
    refuse_sharding,
    refuse_synchronized,
)
from fastmeta.training.optimizers import decay_, decayed_parameters, make_optimizer, rate_at
from fastmeta.training.own_update import own_loss
from fastmeta.training.probes import Probes
from fastmeta.training.processes import Processes
from fastmeta.training.shards import FSDPModule, Shards, shard
from fastmeta.training.step_averages import StepAverages


class Trainer:
    """Trains a model on a labeled and an unlabeled stream: base algorithm, method, optimizer, average of weights.

    Everything random is keyed by the seed and the step, so runs that differ only in their base or method share data
    order, initialization and augmentation (but for what CTAugment learns from each of them), and what
    :meth:`state_dict` holds of the streams is their positions. On several processes a step is that of one process on
    the joined batch, but for batch statistics, what a model draws (dropout), and mix-up of unequal parts of a batch.

    Args:
        model: a classifier; images ``[N, channels, height, width]`` to logits ``[N, C]``.
        data: the images.
        base: a base algorithm of :mod:`fastmeta.ssl`.
        method: refines its labels; None for the base alone.
        steps: length of the run, which schedules and ramps refer to.
        seed: of order, augmentation, and what models draw.
        optimizer: how the weights move.
        schedule: how the learning rate changes.
        average: the averaged weights.
        machine: device, precision, workers.
        processes: those of the run, each with its part of every batch.

    Raises:
        ValueError: a batch has fewer images than there are processes, or parts that they cannot be divided into.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        *,
        base: Algorithm,
        method: Refiner | None = None,
        steps: int,
        seed: int = 0,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        average: AverageConfig | None = None,
        machine: MachineConfig | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.data, self.base, self.method = data, base, method
        self.steps, self.seed = steps, seed
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule = schedule or ScheduleConfig()
        self.machine = machine or MachineConfig()
        for part in (self.optimizer_config, self.schedule, self.machine):
            part.check()
        self.processes = processes or Processes()
        self.device = torch.device(self.machine.device)
        second_view = base.second_view or ("weak" if method is not None and method.two_views else None)
        self.batches = Batches(
            data,
            second_view=second_view,
            more_views=base.more_views,
            holdout="batch" if method is None else method.holdout,
            fresh=method is not None and method.fresh,
            interval=getattr(method.method, "interval", 1) if method is not None else 1,
            seed=seed,
            machine=self.machine,
            processes=self.processes,
        )

        if self.machine.sharding == "fsdp2":
            refuse_sharding(method, self.machine, self.processes)
        else:  # which goes to the device by parts
            model = model.to(self.device)
        if self.machine.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.machine.batch_norm == "synchronized" and self.processes.group is not None:
            refuse_synchronized(method)
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.processes.group)
        self.model: nn.Module = model
        self.average = ExponentialMovingAverage(model, average or AverageConfig())
        self._shards: Shards | None = None
        if self.machine.sharding == "fsdp2":
            for each in (model, self.average.model):
                shard(each, last_linear(each)[0], self.processes.group, self.device)
            self.average.follow(model)
            self._shards = Shards(model)
        torch.manual_seed(generator_for(seed, "memory").initial_seed())
        self.memory = base.memory(
            len(data.split.unlabeled),
            len(data.images.classes),
            model=model,
            labels=data.images.targets[data.split.labeled],
        )
        """What the base keeps from step to step; None: nothing."""
        weights = model if self._shards is None else self._shards
        self._remembered: list[Tensor] = []
        self._trained_beside: list[nn.Parameter] = []  # parameters that no forward of the network uses
        if self.memory is not None:
            self.memory.to(self.device)
            self._remembered = list(self.memory.buffers())
            self._trained_beside = list(self.memory.parameters())
            weights = nn.ModuleList([weights, self.memory]) if self._trained_beside else weights
        self.optimizer = make_optimizer(weights, self.optimizer_config)
        self._decayed: list[Tensor] = list(decayed_parameters(weights, self.optimizer_config))
        self._parameters = [parameter for parameter in weights.parameters() if parameter.requires_grad]
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.network = model
        if self.processes.group is not None and self._shards is None:
            images = data.views.plain(torch.zeros(1, *data.images.image_shape, device=self.device))
            self.network = distributed(model, images, self.processes.group)
        refuse_accumulation(method, self.machine)
        if self.machine.compile:
            refuse_compile(base, method)
            model.compile()
        if method is not None:
            method.method.to(self.device)
        if self.machine.graph:
            capture_steps(method, self.processes)

        self.probes: Probes | None = None
        if data.views.policy is not None:
            self.probes = Probes(data.views.policy, data.labeled_batch, seed, self.processes, self.device)
        self.step = 0
        self.label_changes = LabelChanges(len(data.split.unlabeled), self.device)
        truth = data.images.targets[data.split.unlabeled].to(self.device)
        self._truth = torch.full_like(truth[:, 0], -1) if truth.is_floating_point() else truth  # of classes alone
        self.step_averages = StepAverages(self.processes, self.device)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=self.device)
        """Steps without a finite loss: all of them, and those in a row up to now."""
        self.seconds = 0.0
        """Wall time of the steps so far."""

    def train_step(self) -> None:
        """One update of the weights, their average and the method."""
        begin = time.perf_counter()
        # What a model draws (dropout) is a function of the step: nothing random is left to save.
        torch.manual_seed(generator_for(self.seed, "step", self.step, self.processes.rank).initial_seed())
        rate = self.optimizer_config.peak * rate_at(self.schedule, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.method is not None and self.method.scheduled is not None:
            setattr(self.method.method, self.method.scheduled, self.method.scheduled_factor * rate)
        self.model.train()
        self.processes.broadcast_(self._buffers)
        buffers = [buffer.clone() for buffer in self._buffers]
        remembered = [buffer.clone() for buffer in self._remembered]
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._zero_gradients()
        parts = self.machine.accumulation
        for part in range(parts):
            batch = self.batches(parts * self.step + part)
            if self.probes is not None:
                with self._precision():
                    self.probes.add(self.step, self.average.model, batch)
            with self._gradients_kept_apart(part + 1 < parts), self._precision():
                loss = self._base_loss(batch)
                (loss.total / parts).backward()
            if self._shards is not None and part + 1 == parts:
                self._average(self._shards.take_gradients())
            finite &= loss.total.detach().isfinite()
            self.step_averages.add(loss, self._truth[batch.index], batch.unlabeled_share)
            if self.method is not None and loss.imputed is not None and loss.used is not None:
                self.label_changes.add(self.step, batch.index, loss.imputed, loss.used.soft)
        self._average([parameter.grad for parameter in self._trained_beside if parameter.grad is not None])
        self._update(finite)
        whole = finite
        if self.method is not None and self.method.own_update:
            self._zero_gradients()
            with self._precision():
                own = self._method_loss(self.method, batch)
                own.backward()
            self._average_gradients()
            own_finite = own.detach().isfinite()
            self._update(own_finite)
            whole = finite & own_finite
        if self.method is not None and self.method.fresh:
            self._learn_from_fresh_batches(self.method)
        self.skipped[0] += ~whole
        self.skipped[1] = torch.where(whole, 0, self.skipped[1] + 1)
        decay_(self._decayed, self.optimizer_config, rate * finite.double())
        put_back_(self._buffers, buffers, where=~whole)
        for kept, before in zip(self._remembered, remembered, strict=True):
            kept.copy_(torch.where(whole, kept, before))
        if self.probes is not None:
            self.probes.update(self.step, whole)
        self.average.update()
        self.step += 1
        self.seconds += time.perf_counter() - begin

    def _base_loss(self, batch: TrainingBatch) -> StepLoss:
        refiner = None if self.method is None or self.method.own_update else self.method
        reading = refiner.method.learning(False) if refiner is not None and refiner.fresh else contextlib.nullcontext()
        with reading:
            return self._loss_of_base(self.network, batch, refiner, self.memory)

    def _loss_of_base(
        self, model: nn.Module, batch: TrainingBatch, refiner: Refiner | None, memory: nn.Module | None
    ) -> StepLoss:
        progress, teacher = self.step / self.steps, self.average.model
        return self.base.loss(model, batch, teacher=teacher, progress=progress, refiner=refiner, memory=memory)

    def _learn_from_fresh_batches(self, refiner: Refiner) -> None:
        """The step of the method's table at the parameters that the last ``interval`` updates of the base left."""
        number, left = divmod(self.step + 1, getattr(refiner.method, "interval", 1))
        if left:
            return
        batch = self.batches.fresh(number - 1)
        with torch.no_grad(), frozen_statistics(self.model), refiner.method.learning(True), self._precision():
            self._loss_of_base(self.model, batch, refiner, copy.deepcopy(self.memory))

    def _method_loss(self, refiner: Refiner, batch: TrainingBatch) -> Tensor:
        """The method's loss at the parameters that the base's update left, from passes of its own."""
        return own_loss(
            refiner,
            batch,
            model=self.model,
            teacher=self.average.model,
            base=self.base,
            memory=self.memory,
            processes=self.processes.count,
        )

    def _zero_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self._shards is not None:
            self.model.zero_grad()

    def _update(self, finite: Tensor) -> None:
        """A step of the optimizer, left out on all processes if any has no finite loss or gradient: ``finite``."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).sum()
        bad = self.processes.sum_(((~finite) | ~norm.isfinite()).float()) > 0
        finite.copy_(~bad)
        self.optimizer.found_inf, self.optimizer.grad_scale = bad.float(), None  # type: ignore[attr-defined]
        self.optimizer.step()

    def _average_gradients(self) -> None:
        """What DistributedDataParallel does in its own backward, for a loss whose passes do not go through it."""
        self._average([parameter.grad for parameter in self._parameters if parameter.grad is not None])

    def _average(self, gradients: list[Tensor]) -> None:
        if self.processes.group is not None and gradients:
            summed = sum_over(gradients, self.processes.group)
            torch._foreach_copy_(gradients, torch._foreach_div(summed, self.processes.count))

    def synchronize(self) -> None:
        """Running statistics and label changes become the same on all processes (those of the first, the largest)."""
        averaged = [buffer for buffer in self.average.model.buffers() if buffer.is_floating_point()]
        self.processes.broadcast_(self._buffers + averaged)
        self.label_changes.join(self.processes)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; tensors and plain values only. Every process calls it."""
        self.synchronize()
        return {
            "step": self.step,
            "positions": self.batches.positions(self.step * self.machine.accumulation),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._spread(self.optimizer.state_dict()),
            "method": None if self.method is None else self.method.method.state_dict(),
            "memory": None if self.memory is None else self.memory.state_dict(),
            "augmentation": None if self.probes is None else self.probes.policy.state_dict(),
            "label_changes": self.label_changes.state_dict(),
            "averages": self.step_averages.state_dict(),
            "skipped": self.skipped,
            "unreadable": self.processes.joined(self.batches.unreadable),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a run with the same settings, on any number of processes."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        moments = state["optimizer"]
        self.optimizer.load_state_dict(moments if self._shards is None else self._shards.gather(moments))
        if self.method is not None:
            self.method.method.load_state_dict(state["method"])
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])
        if self.probes is not None:
            self.probes.policy.load_state_dict(state["augmentation"])
        self.label_changes.load_state_dict(state["label_changes"])
        self.step_averages.load_state_dict(state["averages"])
        self.skipped.copy_(state["skipped"])
        self.batches.close()
        self.batches.unreadable = state["unreadable"]

    def _spread(self, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return state if self._shards is None else self._shards.spread(state, parameters)

    def _gradients_kept_apart(self, apart: bool) -> contextlib.AbstractContextManager[Any]:
        """Whether a backward pass leaves the gradients of the processes as they are."""
        if isinstance(self.network, FSDPModule):
            # A method's own backward passes, in between, need their gradients at once.
            own = self.method is not None and self.method.passes == "own"
            self.network.set_requires_gradient_sync(own or not apart)
        if apart and isinstance(self.network, nn.parallel.DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.machine.precision == "bfloat16")
