"""A rank's engine as its plan has it: its place in the ring, its weights, its cache and its stage."""

from collections.abc import Sequence
from pathlib import Path

from noria import attention, kinds
from noria.arrays import Layout
from noria.blocks import layer_name
from noria.checkpoint.scratch import scratch_region
from noria.engine.activations import InHost, OnDevice
from noria.engine.batch import Batches, Network
from noria.engine.cycle import Cycle
from noria.engine.executor import Executor
from noria.engine.kv_cache import KvCache, Staging, TierPages
from noria.engine.loading import Loader, Placed
from noria.engine.parameters import TORCH_DTYPES
from noria.engine.sampler import Sampler
from noria.engine.stage import Moved, Stage
from noria.engine.timing import Meters, Traffic
from noria.engine.weights import Weights
from noria.limits import DISK_SLOT_NBYTES
from noria.model import ModelShape, OpenModel
from noria.order import Place
from noria.plan.placement import stages_of
from noria.plan.plan import Plan
from noria.ring.base import RingShape
from noria.ring.ring import AnyRing, open_ring
from noria.streams import Streams
from noria.tiers.cpu import Cpu
from noria.tiers.disk import Disk
from noria.transports import Transport


def open_the_ring(plan: Plan, shape: ModelShape, transport: Transport | None, rank: int, streams: Streams) -> AnyRing:
    """This rank's place in the ring, with the buffers of its messages."""
    place = Place(rank, plan.num_ranks, plan.groups, plan.laps)
    dtype, in_host = TORCH_DTYPES[plan.dtype], plan.activations == "cpu"
    return open_ring(
        transport, RingShape(place, shape.hidden_size, plan.step_tokens, dtype, in_host), streams, plan.blocking
    )


def load(
    plan: Plan, checkpoint: OpenModel, rank: int, streams: Streams, traffic: Traffic, scratch: Path | None
) -> Weights:
    """This rank's weights, where the plan has them; those on disk go to `scratch` first, if it is given.

    Raises InputError for a block that is damaged.
    """
    stages, ahead = stages_of(rank, plan.num_ranks, plan.ranges()), plan.schedule != "sequential"
    placed = Loader(checkpoint, plan.weight_tiers[rank], plan.dtype, streams, scratch).load()
    return weights_of(placed, stages, plan.groups, plan.weight_slots, streams, traffic, ahead)


def weights_of(
    placed: Placed,
    stages: Sequence[range],
    groups: int,
    num_slots: int,
    streams: Streams,
    traffic: Traffic,
    ahead: bool = True,
) -> Weights:
    """What was placed, with the cycle of its streamed blocks; `stages` are the rank's layers, a range a lap."""
    visits = [[layer_name(layer) for layer in layers] for layers in stages]
    visits[-1].append("head")  # of the last lap, where this rank has it
    streamed = [[name for name in names if name in placed.homes] for names in visits]
    cycle = Cycle(streamed, groups, num_slots) if placed.homes else None
    return Weights(placed.resident, placed.homes, cycle, streams, traffic, ahead, placed.tiers)


def build(
    plan: Plan, shape: ModelShape, weights: Weights, ring: AnyRing, streams: Streams, meters: Meters, scratch: Path
) -> Executor:
    """This rank's engine: its cache (what of it lives on disk: in `scratch`) and stage around its weights, in the ring."""
    dtype, stages = TORCH_DTYPES[plan.dtype], stages_of(ring.place.rank, plan.num_ranks, plan.ranges())
    layers, on_device = [layer for stage in stages for layer in stage], plan.of_pool("pages")["gpu"]
    tiers = _open_tiers(plan, shape, layers, streams, scratch)
    staging = Staging(tiers, plan.cache_slots, plan.cache_slot_pages)
    cache = KvCache(shape, layers, on_device, plan.dtype, streams, staging, meters.traffic)
    kind = attention.fitting(streams.device, dtype, shape.cache)
    network = Network(kinds.load("models", shape.family), kind, shape)
    moved = Moved(weights, cache, _activations(plan, shape, streams, meters.traffic))
    batches, sampler = Batches(network, dtype, streams.device, tiers), Sampler(streams.device)
    schedule = kinds.load("schedules", plan.schedule)
    stage = Stage(network, batches, moved, sampler, schedule, streams, meters)
    return Executor(stage, stages, ring, streams, meters)


def _open_tiers(
    plan: Plan, shape: ModelShape, layers: Sequence[int], streams: Streams, scratch: Path
) -> tuple[TierPages, ...]:
    """The tiers beyond the device, with room for the pages that the plan gives each; on disk a file in `scratch`."""
    opened: list[TierPages] = []
    first, arrays = 0, {layer: shape.arrays(layer) for layer in layers}
    for name, num_pages in plan.of_pool("pages").items():
        nbytes = Layout(arrays, plan.dtype, num_pages).nbytes
        if name == "cpu" and num_pages:
            memory = Cpu(nbytes, streams)
            memory.touch()
            memory.register()
            opened.append(TierPages(first, num_pages, memory, ("host_to_gpu",), ("gpu_to_host",)))
        elif name == "disk" and num_pages:
            disk = Disk(
                scratch_region(scratch, nbytes),
                streams,
                slot_nbytes=min(DISK_SLOT_NBYTES, nbytes // max(len(layers), 1)),
            )
            links = ("disk_to_host", "host_to_gpu"), ("gpu_to_host", "host_to_disk")
            opened.append(TierPages(first, num_pages, disk, *links))
        first += num_pages
    return tuple(opened)


def _activations(plan: Plan, shape: ModelShape, streams: Streams, traffic: Traffic) -> OnDevice | InHost:
    """Where hidden states are between layers."""
    if plan.activations == "gpu":
        return OnDevice()
    sizes = plan.step_tokens, plan.microbatch_tokens, shape.hidden_size
    return InHost(*sizes, TORCH_DTYPES[plan.dtype], streams, traffic)
