"""A rank's engine as its plan has it: its place in the ring, its weights, its cache and its stage."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from noria import attention, kinds
from noria.arrays import Layout
from noria.blocks import layer_name
from noria.bundle import borders_of, within
from noria.checkpoint.scratch import scratch_region
from noria.engine.activations import InHost, OnDevice
from noria.engine.batch import Attention, Batches, Network
from noria.engine.cycle import Cycle
from noria.engine.decoding import Decoding
from noria.engine.executor import Executor
from noria.engine.graphs import refused
from noria.engine.kv_cache import KvCache, Staging, TierPages
from noria.engine.loading import Loader
from noria.engine.padding import Spare
from noria.engine.parameters import TORCH_DTYPES
from noria.engine.rounding import RoundedAttention
from noria.engine.sampler import Sampler
from noria.engine.stage import Moved, Stage
from noria.engine.timing import Meters, Traffic
from noria.engine.weights import Placed, Weights
from noria.kernels import drawing
from noria.limits import DISK_SLOT_NBYTES
from noria.model import ModelShape, OpenModel
from noria.order import Place
from noria.plan.placement import stages_of
from noria.plan.plan import Plan
from noria.ring.base import RingShape
from noria.ring.ring import AnyRing, open_ring
from noria.streams import Streams
from noria.tiers import Tier
from noria.tiers.cpu import Cpu
from noria.tiers.disk import Disk
from noria.transports import Transport

Links: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]  # over which a tier loads, and stores


def open_the_ring(plan: Plan, shape: ModelShape, transport: Transport | None, rank: int, streams: Streams) -> AnyRing:
    """This rank's place in the ring, with the buffers of its messages."""
    place = Place(rank, plan.num_ranks, plan.groups, plan.laps)
    borders = borders_of(shape, plan.dtype)
    entering = tuple(borders[layers.start] for layers in plan.ranges())
    ring = RingShape(place, entering, plan.step_tokens, plan.activations == "cpu")
    return open_ring(transport, ring, streams, plan.blocking)


def load(
    plan: Plan, checkpoint: OpenModel, rank: int, streams: Streams, meters: Meters, scratch: Path | None
) -> Weights:
    """This rank's weights, where the plan has them; those on disk go to `scratch` first, if it is given.

    Raises InputError for a block that is damaged.
    """
    stages, ahead = stages_of(rank, plan.num_ranks, plan.ranges()), plan.schedule != "sequential"
    decoding = Decoding(plan.decoding_room, plan.decoded, plan.coded)
    loader = Loader(checkpoint, plan.weight_tiers[rank], plan.dtype, streams, scratch, decoding, meters.say)
    placed = replace(loader.load(), chosen_tokens=plan.chosen_tokens)
    return weights_of(placed, stages, plan.groups, plan.weight_slots, streams, meters.traffic, ahead)


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
    return Weights(placed, cycle, streams, traffic, ahead)


def build(
    plan: Plan, shape: ModelShape, weights: Weights, ring: AnyRing, streams: Streams, meters: Meters, scratch: Path
) -> Executor:
    """This rank's engine: its cache (what of it lives on disk: in `scratch`) and stage around its weights, in the ring."""
    shape, dtype = plan.kept(shape), TORCH_DTYPES[plan.dtype]
    stages = stages_of(ring.place.rank, plan.num_ranks, plan.ranges())
    layers = [layer for stage in stages for layer in stage]
    tiers = _open_tiers(plan, shape, layers, streams, scratch)
    staging = Staging(tiers, plan.cache_slots, plan.cache_slot_pages, plan.state_rows)
    kind = _over(attention.fitting(streams.device, dtype, shape)[0], plan, shape, layers, streams)
    spare = _spare(plan, kind, weights, layers, streams, meters.say)
    held = plan.pools["gpu"]["pages"] + bool(spare), plan.pools["gpu"]["states"] + bool(spare)
    cache = KvCache(shape, layers, held, plan.dtype, streams, staging, meters.traffic)
    network = Network(kinds.load("models", shape.family), kind, shape)
    moved = Moved(weights, cache, _activations(plan, shape, stages, streams, meters.traffic))
    batches = Batches(network, dtype, streams.device, tiers, spare)
    sampler = Sampler(streams.device, by_kernels=not drawing.refuses(streams.device, dtype, shape.vocab_size))
    schedule = kinds.load("schedules", plan.schedule)
    stage = Stage(network, batches, moved, sampler, schedule, streams, meters)
    return Executor(stage, stages, ring, meters)


def _spare(
    plan: Plan,
    kind: Attention,
    weights: Weights,
    layers: Sequence[int],
    streams: Streams,
    say: Callable[[str], None],
) -> Spare | None:
    """The page and the state behind the device's others, where decode steps are captured as graphs; says why they are not."""
    if not plan.graph_rows:
        return None
    why = refused(kind, weights, layers, streams)
    if why:
        say(f"no graphs: {why}")
        return None
    return Spare(plan.pools["gpu"]["pages"], plan.pools["gpu"]["states"], plan.graph_rows)


def _over(kind: ModuleType, plan: Plan, shape: ModelShape, layers: Sequence[int], streams: Streams) -> Attention:
    """The kind of attention over the cache of these layers as it is kept."""
    if not shape.cache_encoding:
        return kind
    decoded = max((shape.decoded_nbytes([range(layer, layer + 1)], plan.dtype) for layer in layers), default=0)
    dtype, device = TORCH_DTYPES[plan.dtype], streams.device
    in_tiles = not attention.decodes_ahead(kind, device, dtype, shape)
    return RoundedAttention(kind, plan.decoded_pages, decoded, dtype, device, in_tiles)


def _open_tiers(
    plan: Plan, shape: ModelShape, layers: Sequence[int], streams: Streams, scratch: Path
) -> tuple[TierPages, ...]:
    """The tiers beyond the device, with room for what the plan gives each; on disk a file in `scratch`."""
    opened: list[TierPages] = []
    first, first_state, arrays = 0, 0, {layer: shape.stored(layer) for layer in layers}
    for name, pools in plan.pools.items():
        pages, states = pools["pages"], pools["states"]
        if name != "gpu" and pages:
            nbytes = max(Layout(arrays, plan.dtype, pages, states).nbytes, 1)  # a rank's layers may leave nothing
            tier, links = _open_tier(name, nbytes, nbytes // max(len(layers), 1), streams, scratch)
            opened.append(TierPages(first, pages, tier, *links, first_state, states))
        first, first_state = first + pages, first_state + states
    return tuple(opened)


def _open_tier(name: str, nbytes: int, of_layer: int, streams: Streams, scratch: Path) -> tuple[Tier, Links]:
    """A tier for the cache, and the links over which it loads and stores. of_layer: bytes of a layer, on average."""
    if name == "cpu":
        memory = Cpu(nbytes, streams)
        memory.touch()
        memory.register()
        return memory, (("host_to_gpu",), ("gpu_to_host",))
    disk = Disk(scratch_region(scratch, nbytes), streams, slot_nbytes=max(min(DISK_SLOT_NBYTES, of_layer), 1))
    return disk, (("disk_to_host", "host_to_gpu"), ("gpu_to_host", "host_to_disk"))


def _activations(
    plan: Plan, shape: ModelShape, stages: list[range], streams: Streams, traffic: Traffic
) -> OnDevice | InHost:
    """Where hidden states are between layers."""
    if plan.activations == "gpu":
        return OnDevice()
    borders = borders_of(shape, plan.dtype)
    return InHost(plan.step_tokens, plan.microbatch_tokens, borders, within(borders, stages), streams, traffic)
