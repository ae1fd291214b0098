"""A rank's engine as its plan has it: its place in the ring, its weights, its cache and its stage."""

from pathlib import Path

from noria import attention, kinds
from noria.engine.activations import InHost, OnDevice
from noria.engine.executor import Executor
from noria.engine.kv_cache import KvCache, open_tiers
from noria.engine.loading import Loader
from noria.engine.sampler import Sampler
from noria.engine.stage import Stage
from noria.engine.trace import OFF, Tracing
from noria.engine.traffic import Traffic
from noria.engine.weights import TORCH_DTYPES, Weights
from noria.model import ModelShape, OpenModel
from noria.plan.placement import stages_of
from noria.plan.plan import Plan
from noria.ring.ring import AnyRing, open_ring
from noria.streams import Streams
from noria.tools.progress import log
from noria.transports import Transport


def open_the_ring(plan: Plan, shape: ModelShape, transport: Transport | None, rank: int, streams: Streams) -> AnyRing:
    """This rank's place in the ring, with the buffers of its messages."""
    return open_ring(
        transport,
        rank,
        plan.num_ranks,
        plan.groups,
        plan.laps,
        shape.hidden_size,
        plan.step_tokens,
        TORCH_DTYPES[plan.dtype],
        streams.device,
        streams,
        plan.blocking,
        plan.activations == "cpu",
    )


def load(
    plan: Plan, checkpoint: OpenModel, rank: int, streams: Streams, traffic: Traffic, scratch: Path | None
) -> Weights:
    """This rank's weights, where the plan has them; those on disk go to `scratch` first, if it is given.

    Raises InputError for a block that is damaged.
    """
    stages, ahead = stages_of(rank, plan.num_ranks, plan.ranges()), plan.schedule != "sequential"
    loader = Loader(checkpoint, plan.weight_tiers[rank], plan.dtype, streams, scratch)
    return loader.load(stages, plan.groups, plan.weight_slots, traffic, ahead)


def build(
    plan: Plan,
    shape: ModelShape,
    weights: Weights,
    ring: AnyRing,
    rank: int,
    streams: Streams,
    traffic: Traffic,
    scratch: Path,
    trace: Tracing = OFF,
) -> Executor:
    """This rank's engine: its cache (what of it lives on disk: in `scratch`) and stage around its weights, in the ring."""
    dtype, stages = TORCH_DTYPES[plan.dtype], stages_of(rank, plan.num_ranks, plan.ranges())
    layers = [layer for stage in stages for layer in stage]
    elsewhere = open_tiers(plan.cache_pages, shape, len(layers), plan.dtype, streams, scratch)
    cache = KvCache(
        shape,
        layers,
        plan.cache_pages.get("gpu", 0),
        dtype,
        streams,
        elsewhere,
        plan.cache_slots,
        plan.cache_slot_pages,
        traffic,
    )
    stage = Stage(
        kinds.load("models", shape.family),
        attention.choose(streams.device, dtype, shape.head_dim),
        shape,
        weights,
        cache,
        Sampler(streams.device),
        kinds.load("schedules", plan.schedule),
        dtype,
        streams,
        lambda message: log(rank, plan.num_ranks, message),
        trace,
        activations=_activations(plan, shape, streams, traffic),
    )
    return Executor(stage, stages, ring, rank, plan.num_ranks, plan.groups, streams, traffic, trace)


def _activations(plan: Plan, shape: ModelShape, streams: Streams, traffic: Traffic) -> OnDevice | InHost:
    """Where hidden states are between layers."""
    if plan.activations == "gpu":
        return OnDevice()
    sizes = plan.step_tokens, plan.microbatch_tokens, shape.hidden_size
    return InHost(*sizes, TORCH_DTYPES[plan.dtype], streams, traffic)
