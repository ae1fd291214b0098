"""`--trace`: one file for all ranks, whose spans are those of the run."""

import json
import os
import shutil
from collections import Counter, defaultdict
from itertools import pairwise, product
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import small_run
import tiny_models
import world
from mpirun import describe
from noria.__main__ import main
from noria.batch_copies import CopyRuns
from noria.checkpoint.convert import convert
from noria.engine import trace as tracing
from noria.engine.trace import Trace
from noria.streams import CpuStreams, streams_of
from noria.tools.trace_file import TraceFile

LAYERS, ROUNDS, GROUPS, MICROBATCHES = 6, 4, 2, 2
KEYS = ["--max-new-tokens", ROUNDS, "--groups", GROUPS, "--microbatches", MICROBATCHES]
PLACED = ["--weights", "gpu=20,cpu=50,disk=30", "--cache", "gpu=50,cpu=50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    config = tiny_models.LLAMA | {"num_hidden_layers": LAYERS}
    tiny_models.write_directory(folder / "hf", config, tiny_models.state(config))
    convert(folder / "hf", folder / "model.h5")
    return small_run.write_files(folder)


def traced(folder, name, *more):
    return small_run.command(
        folder, f"{name}.h5", *KEYS, "--scratch", folder, "--trace", folder / f"{name}.json", *more
    )


class Read:
    """A trace's spans as (begin, end) in ns, with its output's sums of `timing`."""

    def __init__(self, folder, name):
        self.events = json.loads((folder / f"{name}.json").read_text())["traceEvents"]
        self.spans = [event for event in self.events if event["ph"] == "X"]
        with h5py.File(folder / f"{name}.h5") as file:
            self.timing = {name: column[:] for name, column in file["timing"].items()}

    def of(self, track, **args):
        return [s for s in self.spans if s["cat"] == track and all(s["args"].get(k) == v for k, v in args.items())]

    def names(self):
        return {e["args"]["name"] for e in self.events if e["name"] == "thread_name"}


def interval(span):
    return round(span["ts"] * 1000), round(span["ts"] * 1000) + round(span["dur"] * 1000)


def check(read, num_ranks, microbatches=None):
    """What holds for every trace of KEYS."""
    ranks = {e["pid"]: e["args"]["name"] for e in read.events if e["name"] == "process_name"}
    assert sorted(ranks) == list(range(num_ranks)) and all(f"rank {rank}:" in title for rank, title in ranks.items())
    check_apart(read.spans)
    check_compute(read, microbatches)
    check_loads(read)
    for rank in range(num_ranks):
        steps = [span for span in read.of("steps") if span["pid"] == rank]
        names = [span["name"] for span in steps]
        assert names[:ROUNDS] == ["prefill", *["decode"] * (ROUNDS - 1)] and set(names[ROUNDS:]) == {"no tokens"}
        assert [span["args"]["round"] for span in steps] == list(range(read.timing["rounds"][rank]))
        assert sum(span["args"]["tokens"] for span in steps) == read.timing["tokens"][rank]
        begin, end = interval(steps[0])[0], interval(steps[-1])[1]
        assert abs((end - begin) / 1e9 - read.timing["seconds"][rank]) < 0.01
        waits = [span for span in read.of("waits") if span["pid"] == rank]
        assert waits and all(begin <= interval(w)[0] and interval(w)[1] <= end for w in waits)
        waited = sum(interval(w)[1] - interval(w)[0] for w in waits) / 1e9
        assert abs(waited - read.timing["waited"][rank]) < 1e-3
        for span in read.of("compute"):
            if span["pid"] == rank:
                assert begin <= interval(span)[0] and interval(span)[1] <= end


def check_apart(spans):
    tracks = defaultdict(list)
    for span in spans:
        tracks[span["pid"], span["tid"]].append(interval(span))
    for track, intervals in tracks.items():
        intervals.sort()
        for (_, end), (begin, _) in pairwise(intervals):
            assert end <= begin + 2, track  # ns: microseconds are written with three places


def check_compute(read, microbatches):
    """Each layer once a round, group and microbatch; `microbatches` None: where the tiers of the cache cut them."""
    layers = [span for span in read.of("compute") if span["name"] == "layer"]
    keys = Counter(tuple(span["args"][key] for key in ("round", "group", "layer", "microbatch")) for span in layers)
    most = {visit: 1 + max(key[3] for key in keys if key[:2] == visit) for visit in {key[:2] for key in keys}}
    assert set(most) == set(product(range(ROUNDS), range(GROUPS)))
    assert microbatches is None or set(most.values()) == {microbatches}
    wanted = {(*visit, *rest) for visit, number in most.items() for rest in product(range(LAYERS), range(number))}
    assert set(keys) == wanted and set(keys.values()) == {1}
    assert "compute 2" not in read.names() and {"compute", "steps", "waits"} <= read.names()
    heads = [span["name"] for span in read.of("compute") if span["name"] != "layer"]
    assert Counter(heads) == dict.fromkeys(("embed", "head", "sample"), ROUNDS * GROUPS)


def check_loads(read):
    counted = sum(read.timing[f"{phase}_host_to_gpu_nbytes"].sum() for phase in ("prefill", "decode"))
    assert (
        sum(span["args"]["bytes"] for span in read.of("load")) == counted + read.timing["weights_unused_nbytes"].sum()
    )
    stored = sum(read.timing[f"{phase}_gpu_to_host_nbytes"].sum() for phase in ("prefill", "decode"))
    assert sum(span["args"]["bytes"] for span in read.of("store")) == stored
    assert {span["name"] for span in read.of("store")} <= {"cache"}


@pytest.mark.slow
def test_a_rank_alone_leaves_a_trace_of_its_run(folder):
    assert main(traced(folder, "alone", *PLACED)) == 0
    read = Read(folder, "alone")
    check(read, 1)
    names = {span["name"] for span in read.of("load")}
    assert "cache" in names and any(name.startswith("layers/") for name in names)
    assert not read.of("send") and not read.of("receive") and read.of("store")
    assert {span["name"] for span in read.of("waits")} == {"waiting for results"}


@pytest.mark.slow
def test_without_the_flag_nothing_is_kept(folder, monkeypatch):
    monkeypatch.setattr(tracing, "Trace", None)
    monkeypatch.setattr("noria.run.Trace", None)
    before = set(folder.iterdir())
    assert main(small_run.command(folder, "plain.h5", *KEYS, *PLACED, "--scratch", folder)) == 0
    assert {path.name for path in set(folder.iterdir()) - before} == {"plain.h5"}


@pytest.mark.slow
def test_a_trace_changes_no_token(folder):
    assert main(small_run.command(folder, "without.h5", *KEYS)) == 0
    assert main(traced(folder, "with")) == 0
    check(Read(folder, "with"), 1, MICROBATCHES)
    assert small_run.rows_of(folder / "with.h5") == small_run.rows_of(folder / "without.h5")


@pytest.mark.parametrize(
    "name", ["model.h5", "prompts.jsonl", "taken.h5", "hf", "nowhere/trace.json", "pipe", "to-pipe", "rates.toml"]
)
def test_a_trace_that_would_write_over_the_run_or_nowhere_is_refused_first(folder, name, capsys):
    if name in ("pipe", "to-pipe"):
        os.mkfifo(folder / "pipe")
        (folder / "to-pipe").symlink_to("pipe")
    shutil.copyfile(Path(__file__).parent / "data" / "noria-rates-cpu.toml", folder / "rates.toml")
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    keys = ["--trace", folder / name, "--machine", folder / "rates.toml"]
    assert main(small_run.command(folder, "taken.h5", *keys)) == 2
    assert name.split("/")[0] in capsys.readouterr().err
    for made in ("pipe", "to-pipe"):
        (folder / made).unlink(missing_ok=True)
    left = [path for path in folder.iterdir() if path.suffix != ".lock"]
    assert {path: at for path, at in files.items() if "pipe" not in path.name} == {
        path: path.stat().st_mtime_ns for path in left
    }


@pytest.mark.slow
@pytest.mark.world
@pytest.mark.parametrize("more", [["--laps", 2], ["--laps", 1, "--blocking", "--groups", 2]], ids=["laps", "blocking"])
def test_two_ranks_leave_one_trace_on_one_clock(folder, more):
    name = f"two-{len(more)}"
    done = world.command(2, traced(folder, name, *PLACED, *more))
    assert done.returncode == 0, describe(done)
    read = Read(folder, name)
    check(read, 2)
    hidden = {track: [s for s in read.of(track) if s["name"] == "hidden"] for track in ("send", "receive")}
    total = sum(read.timing[f"{phase}_rank_to_rank_nbytes"].sum() for phase in ("prefill", "decode"))
    for spans in hidden.values():
        assert sum(span["args"]["bytes"] for span in spans) == total
    for group in range(GROUPS):  # messages of a group between two ranks come in the order in which they go
        for sender in range(2):
            sent = sorted(interval(s) for s in hidden["send"] if (s["pid"], s["args"]["group"]) == (sender, group))
            came = sorted(
                interval(s) for s in hidden["receive"] if (s["pid"], s["args"]["group"]) == (1 - sender, group)
            )
            # None arrives before it goes, to within what clocks can be aligned to on a machine with more work than cores.
            assert all(there[1] > here[0] - 1_000_000 for here, there in zip(sent, came, strict=True))
    assert {s["name"] for s in read.of("waits") if s["pid"] == 1} >= {"waiting for hidden states"}


class Clock:
    """Streams whose marks are numbers of ns, as the test sets them."""

    now = 0

    def mark(self):
        return self.now

    def nanoseconds(self, start, mark):
        return mark - start

    def anchor(self):
        return 0, self.now


def events(trace, offset=0):
    return [json.loads(event) for event in trace.events(offset)]


def test_what_is_over_the_limit_is_counted_and_said():
    trace = Trace(0, "rank 0", Clock(), limit=3)
    for _ in range(5):
        trace.compute("layer", trace.mark(), 0, 0, 0, 1, 0)
    found = events(trace)
    assert trace.dropped == 2 and sum(event["ph"] == "X" for event in found) == 3
    assert found[0]["args"]["name"] == "rank 0 (2 events dropped)"


def test_spans_that_overlap_get_tracks_beside_each_other():
    trace = Trace(0, "rank 0", Clock())
    for begin, end in ((0.0, 1.0), (0.5, 2.0), (1.5, 3.0)):
        trace.host("send", "hidden", begin, end)
    spans = [event for event in events(trace) if event["ph"] == "X"]
    check_apart(spans)
    assert len(spans) == 3 and len({span["tid"] for span in spans}) == 2


def test_a_clock_that_drifts_is_drawn_straight(monkeypatch):
    """Between the offsets measured at the start and at the end, those in between lie on a line."""
    monkeypatch.setattr(tracing.time, "perf_counter_ns", lambda: 1_000_000_000)
    trace = Trace(1, "rank 1", Clock())
    trace.start(offset=1_000, zero=1_000)
    trace.host("waits", "half way", 0.5, 0.5)
    span = next(event for event in events(trace, offset=3_000) if event["ph"] == "X")
    assert span["ts"] == 500_000 + 1  # 1000 ns of drift


def test_copies_carry_the_label_of_their_buffer():
    streams = streams_of(torch.device("cpu"))
    buffer, other = torch.zeros(8), torch.ones(8)
    streams.label(buffer, "unseen")
    trace = Trace(0, "rank 0", streams)
    streams.label(buffer, "block", layer=3)
    streams.copy("load", [(buffer[:4], other[:4])])
    streams.copy("store", ((a, b) for a, b in [(other[:2], buffer[:2])]))
    streams.copy("load", [])
    spans = [event for event in events(trace) if event["ph"] == "X"]
    assert [(s["cat"], s["name"], s["args"]) for s in spans] == [
        ("load", "block", {"layer": 3, "bytes": 16}),
        ("store", "block", {"layer": 3, "bytes": 8}),
    ]
    assert buffer.tolist() == [1.0] * 4 + [0.0] * 4


def test_runs_that_are_copied_by_one_call_are_looked_at_one_by_one_for_a_trace_alone():
    class OnceThrough(CpuStreams):
        def copy(self, lane, runs, after=()):  # as on a GPU, where one call copies all
            begin = self._begin()
            self._end(lane, runs, begin)

    class Runs(CopyRuns):
        def __iter__(self):
            looked.append(len(self))
            return super().__iter__()

    class Watch:
        watches = True

        def copied(self, lane, begin, end):
            watched.append((lane, list(looked)))

    looked, watched, seen = [], [], []
    streams, (to, at, nbytes) = OnceThrough(torch.device("cpu")), (np.array(its) for its in ((0, 4), (2, 5), (1, 3)))
    runs = Runs(torch.zeros(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8), to, at, nbytes)
    streams.watch = Watch()
    streams.copy("load", runs)
    assert watched == [("load", [])] and not looked
    streams.observe = lambda lane, name, args, nbytes, begin, end: seen.append((lane, nbytes))
    streams.copy("load", runs)
    assert seen == [("load", 4)] and watched[1:] == [("load", [])] and looked == [2]


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path):
    file = TraceFile(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    file.add(['{"a": 1}'])
    with pytest.raises(OSError):
        file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    nowhere = TraceFile(tmp_path / "nowhere" / "trace.json")
    nowhere.add(["{}"])
    nowhere.add(["{}"])
    with pytest.raises(OSError, match="no such file or directory"):
        nowhere.close()
