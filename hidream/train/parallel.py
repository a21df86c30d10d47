"""What several processes do to a model, from outside its files, always in one order:

sequence parallel and tensor parallel → activation checkpointing → compile → FSDP2.
"""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hidream.errors import UsageError
from hidream.train.activations import recompute
from hidream.train.config import Recipe
from hidream.train.distributed import World
from hidream.train.layout import Layout, check_batches, check_heads, layout_of
from hidream.train.learner import Learner
from hidream.train.sharding import fill, shard

MOST_COMPILED = 64  # kinds of steps, for each of which a block is compiled


def checked_layout(recipe: Recipe, world: World) -> Layout:
    """The layout of the recipe's run in `world`; UsageError where it does not fit its batches."""
    layout = layout_of(recipe.parallel, world.size)
    sizes = {f"stages.{i}.batch_size": stage.batch_size for i, stage in enumerate(recipe.stages)}
    check_batches(layout, sizes, recipe.accumulate)
    return layout


def check_divisible(layout: Layout, learner: Learner) -> None:
    """UsageError unless tensor and sequence parallel can divide the learner's network."""
    if max(layout.tp, layout.sp) == 1:
        return
    sizes = learner.decoder_sizes()
    if sizes is None:
        raise UsageError(
            f"{learner.recipe.model} has no decoder that parallel.tp and parallel.sp could divide.",
            "They are for O1; leave both at 1.",
        )
    check_heads(layout, *sizes)


class Processes:
    """A layout, and who does what with whom. Every process makes one, at the same time."""

    def __init__(self, layout: Layout, world: World):
        self.layout, self.world = layout, world

    @property
    def sharded(self) -> bool:
        """Whether weights are in shards."""
        return max(self.layout.shard, self.layout.tp) > 1

    @cached_property
    def mesh(self) -> DeviceMesh:
        """How weights lie: `replicate` · `shard` · `tp`. Those that share tokens have the same
        weights, and their part in averaging or sharding them."""
        layout = self.layout
        num_copies = layout.num_processes // (layout.num_shards * layout.tp)
        shape = (num_copies, layout.num_shards, layout.tp)
        return init_device_mesh(
            self._device_type, shape, mesh_dim_names=("replicate", "shard", "tp")
        )

    @cached_property
    def averaging(self) -> World:
        """Those whose gradients are averaged after the backward pass. FSDP's are during it."""
        layout = self.layout
        if layout.shard > 1:
            return World(device=self.world.device)
        if layout.tp == 1:
            return self.world
        return self._world_of(self.mesh["replicate"])

    @cached_property
    def sharing_tokens(self) -> World:
        layout = self.layout
        shape = (layout.num_readers, layout.sp, layout.tp)
        names = ("reader", "sp", "tp")
        return self._world_of(
            init_device_mesh(self._device_type, shape, mesh_dim_names=names)["sp"]
        )

    @cached_property
    def sharing_matrices(self) -> World:
        return self._world_of(self.mesh["tp"])

    @property
    def _device_type(self) -> str:
        return self.world.device.partition(":")[0]

    def _world_of(self, mesh: DeviceMesh) -> World:
        return World(
            rank=mesh.get_local_rank(),
            size=mesh.size(),
            device=self.world.device,
            group=mesh.get_group(),
        )

    def spread(self, learner: Learner) -> tuple[nn.Module, nn.Module]:
        """What this process has of the learner's network at its beginning, and of its averages.

        Of a network in shards, the first process alone ever holds the whole, on its CPU.
        """
        device = torch.device(learner.recipe.device)
        if not self.sharded:
            model = learner.build().to(device)
            averages = copy.deepcopy(model).requires_grad_(False)
            self.apply(model, learner)
            return model, averages
        values = learner.build().state_dict() if self.world.main else {}
        model, averages = learner.skeleton(), learner.skeleton().requires_grad_(False)
        self.apply(model, learner)
        self.shard(averages, learner)
        for part in (model, averages):
            fill(part.to_empty(device=device), values)
        return model, averages

    def apply(self, model: nn.Module, learner: Learner) -> None:
        """Make a whole model, the same in every process, this process's part of it."""
        recipe, blocks = learner.recipe, learner.blocks(model)
        if self.layout.sp > 1:
            from hidream.train.sequence_parallel import split_sequence

            group = self.sharing_tokens.group
            assert group is not None
            split_sequence(learner.decoder(model), group)
        self._split_matrices(model, learner)
        recompute(blocks, recipe.parallel.activation_checkpointing)
        if recipe.compile:
            torch._dynamo.config.recompile_limit = MOST_COMPILED
            torch._dynamo.config.accumulated_recompile_limit = 4 * MOST_COMPILED
            for block in blocks:
                block.compile()
        self._fully_shard(model, learner)

    def shard(self, model: nn.Module, learner: Learner) -> None:
        """Lay a model's weights as `apply` does, for one that is not trained."""
        self._split_matrices(model, learner)
        self._fully_shard(model, learner)

    def _split_matrices(self, model: nn.Module, learner: Learner) -> None:
        if self.layout.tp > 1:
            from hidream.train.tensor_parallel import split_matrices

            split_matrices(learner.decoder(model), self.mesh["tp"])

    def _fully_shard(self, model: nn.Module, learner: Learner) -> None:
        if self.layout.shard > 1:
            names = ("replicate", "shard") if self.layout.replicate > 1 else "shard"
            dtype = getattr(torch, learner.recipe.precision)
            shard(model, learner.units(model), self.mesh[names], dtype)

    def finish_gradients(self, model: nn.Module, learner: Learner) -> None:
        """After a backward pass: what the pass itself did not add up over the processes."""
        if self.layout.tp > 1:
            from hidream.train.tensor_parallel import of_own_heads

            parts = of_own_heads(learner.decoder(model))
            self.sharing_matrices.sum_gradients(parts)
        self.averaging.average_gradients(list(model.parameters()))
