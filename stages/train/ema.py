"""Exponential moving average of the trainable weights: the weights that act.

After step n (from 1) the decay is min(decay, (1 + n) / (10 + n)), so that a short run is not averaged with its random
start (the warm-up of TensorFlow's and diffusers' EMA). In float32, once an optimiser step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from geomcache.cache_schemas.errors import InputError
from geomcache.stages.train.sharding import like, local, part_like


class Ema:
    """Averages of a model's trainable parameters; where parameters are sharded, of this rank's part of them.

    Args:
        model: its trainable parameters are followed, by name.
        decay: of the average, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._decay = decay
        self._gathered = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.averages = {name: local(p).detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Take the present weights in; ``steps_done`` counts this step."""
        weight = 1.0 - min(self._decay, (1 + steps_done) / (10 + steps_done))
        present = [local(parameter).detach() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), present, weight)

    def as_tensors(self) -> dict[str, torch.Tensor]:
        """The averages by name, sharded like their parameters."""
        return {name: like(parameter, self.averages[name]) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def load(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Take whole tensors, as ``as_tensors`` gives them when gathered.

        Raises:
            InputError: they are those of other parameters.
        """
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        if {name: tensor.shape for name, tensor in averages.items()} != shapes:
            raise InputError(
                "the averaged weights do not fit the policy",
                expected=f"{len(shapes)} trainable tensors",
                found=f"{len(averages)} averages of other names or shapes",
                fix="evaluate with the version that saved them, or train anew",
            )
        for name, parameter in self._parameters.items():
            self.averages[name].copy_(part_like(parameter, averages[name]))

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside, its own again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for module in self._gathered:
            module.reshard()  # what a forward pass has gathered, and FSDP2 keeps of its root, would outlive the swap
        for name, parameter in self._parameters.items():
            mine, average = local(parameter).detach(), self.averages[name]
            kept = mine.clone()
            mine.copy_(average)
            average.copy_(kept)
