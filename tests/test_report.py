"""noria report: what it tells, in the terminal and as a page that obeys nobody's texts."""

import html.parser
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from noria.__main__ import main
from noria.limits import HOST_NBYTES
from noria.output.generations import Generation
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.output.segments import history
from noria.report import counted
from noria.report.counted import lengths_of, speeds_of
from noria.report.facts import facts_of
from noria.report.measured import moved, rank_times, terms
from noria.report.page import COLUMNS, POLICY, page_of
from noria.report.terminal import lines_of
from output_rows import fill, make_row

GiB = 2**30
PLAN = {
    "num_ranks": 2,
    "groups": 2,
    "laps": 1,
    "memory": [{"gpu": {"weights": 4 * GiB, "cache": GiB}, "cpu": {"loading": GiB}, "disk": {}}] * 2,
    "predicted": {
        "rows": 100,
        "tokens_per_second": 200.0,
        "prefill": {"tokens_per_second": 1000.0, "round_seconds": 0.5, "binds": "matmul"},
        "decode": {"tokens_per_second": 250.0, "round_seconds": 0.4, "binds": "link"},
        "assumed": ["matmul"],
        "device": "H200",
    },
}
TIMING = {
    "seconds": [20.0, 19.0],
    "waited": [5.0, 1.0],
    "prefill_seconds": [4.0, 3.0],
    "prefill_rounds": [4, 4],
    "prefill_tokens": [4000, 4000],
    "decode_seconds": [15.0, 15.5],
    "decode_rounds": [31, 31],
    "decode_tokens": [3100, 3100],
    "peak_device_nbytes": [4 * GiB, 6 * GiB],
    "peak_host_nbytes": [3 * GiB, 2 * GiB],
    "decode_host_to_gpu_nbytes": [30 * GiB, 31 * GiB],
    "prefill_host_to_gpu_nbytes": [0, 0],
    "decode_watched_seconds": [4.0, 4.0],
    "decode_compute_seconds": [3.0, 2.0],
    "decode_idle_input_seconds": [0.5, 1.0],
    "decode_idle_weights_seconds": [0.0, 0.5],
    "decode_idle_cache_seconds": [0.0, 0.0],
    "decode_sampled": [3100, 3100],
    "decode_flops": [15e12, 31e12],
    "decode_memory_nbytes": [15e12, 15.5e12],
}
SEGMENT = {"start": "2026-11-29T01:00:00Z", "ranks": 2, "hosts": ["node3"], "devices": ["node3 cuda:0", "node3 cuda:1"]}
SPECIAL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"


def finish(path, rows, attrs=None, timing=None, segment=None):
    parts = Parts(path, {"sampling.max_new_tokens": 8, "model": 1})
    parts.begin({**SEGMENT, **(segment or {}), "of": len(rows)})
    fill(parts, rows, 1000)
    parts.end("finished")
    merge(parts, path, len(rows), {**history(parts.folder), **(attrs or {})}, timing or {})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rows = [make_row(row, status="error" if row % 10 == 9 else "done") for row in range(60)]
    attrs = {
        "plan": PLAN,
        "devices": SEGMENT["devices"],
        "run_file": 'model = "m.h5"\n',
        "versions": {"noria": "0.1.0"},
    }
    return finish(tmp_path_factory.mktemp("report") / "run.h5", rows, attrs, TIMING)


# What it tells.


def test_predictions_stand_beside_what_the_slowest_rank_measured():
    found = {one.name: one for one in terms(PLAN, {name: np.array(values) for name, values in TIMING.items()}, 3000)}
    assert {name: (one.planned, one.measured, round(one.difference, 3), one.is_off) for name, one in found.items()} == {
        "whole run, tokens/s": ("200.0", "150.0", -0.25, True),
        "prefill, tokens/s": ("1,000", "1,000", 0.0, False),
        "prefill, a round": ("500 ms", "1 s", 1.0, True),
        "decode, tokens/s": ("250.0", "200.0", -0.2, True),
        "decode, a round": ("400 ms", "500 ms", 0.25, True),
        "decode, rows a round": ("100", "100", 0.0, False),
        "GPU memory, rank 1": ("5.0 GiB", "6.0 GiB", 0.2, True),
        "CPU memory, rank 0": ("5.0 GiB", "3.0 GiB", -0.4, False),
    }
    assert found["decode, tokens/s"].note == "bound by link"
    assert HOST_NBYTES == 4 * GiB


def test_on_a_cpu_the_plan_of_both_tiers_is_one_of_host_memory():
    plan = PLAN | {"predicted": {"device": "CPU"}}
    [found] = terms(plan, {"peak_host_nbytes": np.array([1.0, 11 * GiB])}, 0)
    assert (found.name, found.planned, found.is_off) == ("CPU memory, rank 1", "10.0 GiB", True)


def test_phases_of_few_rounds_say_nothing_of_speed():
    timing = {name: np.array(values) for name, values in (TIMING | {"decode_rounds": [2, 2]}).items()}
    assert not [one for one in terms(PLAN, timing, 0) if one.name.startswith("decode")]


def test_the_time_of_a_rank_is_in_three_parts_and_its_links_have_bytes():
    timing = {name: np.array(values) for name, values in TIMING.items()}
    first, second = rank_times(timing, ["a", "b"])
    assert (first.prefill, first.decode, first.rest, first.waited, first.seconds) == (4.0, 15.0, 1.0, 5.0, 20.0)
    assert (second.device, second.rest) == ("b", 0.5)
    assert [(one.link, one.phase, one.nbytes, one.rate) for one in moved(timing)] == [
        ("CPU memory to GPU", "decode", 61 * GiB, 31 * GiB / 15.5)
    ]


@pytest.mark.parametrize("high", [0, 1, 7, 23, 24, 25, 500, 8191, 10**6])
def test_lengths_are_counted_as_numpy_counts_them(high):
    values = np.random.default_rng(high).integers(0, high + 1, 300)
    found = lengths_of(values)
    edges = [*found.starts, found.starts[-1] + found.width]
    assert found.counts == np.histogram(values, edges)[0].tolist() and sum(found.counts) == 300
    assert len(found.counts) <= counted.BINS and (found.width == 1 or len(found.counts) >= counted.BINS // 3)
    assert (found.smallest, found.largest) == (values.min(), values.max())
    assert found.median == np.percentile(values, 50, method="lower") and found.most == np.percentile(
        values, 95, method="lower"
    )
    assert found.mean == pytest.approx(values.mean())
    assert lengths_of(values[:0]) is None


def test_speeds_follow_the_courses_of_all_jobs_one_after_another():
    jobs = [
        {"course": [[0.0, 0, 0], [2.0, 100, 0], [4.0, 100, 50]]},
        {"tokens": 30, "prompt_tokens": 10},
        {"course": [[0, 0, 0]]},
    ]
    found = [(one.start, one.stop, one.prompt, one.new, one.job) for one in speeds_of(jobs, [9.0, 10.0, 0.0])]
    assert found == [(0.0, 2.0, 50.0, 0.0, 0), (2.0, 4.0, 0.0, 25.0, 0), (4.0, 14.0, 1.0, 3.0, 1)]


def test_many_points_are_joined_and_no_token_is_lost():
    course = [[float(at), 3 * at, 2 * at * at] for at in range(1000)]
    found = speeds_of([{"course": course}] * 3, [0.0] * 3)
    assert len(found) <= counted.MAX_POINTS
    tokens = sum(one.new * (one.stop - one.start) for one in found)
    assert tokens == pytest.approx(3 * 2 * 999**2) and all(one.stop > one.start for one in found)
    many = speeds_of([{"tokens": 5}] * 700, [1.0] * 700)
    assert len(many) == counted.MAX_POINTS and many[-1].stop == 700


@pytest.mark.parametrize(
    "course",
    [
        None,
        7,
        "text",
        [1, 2],
        [[1, 2]],
        [[0, 0, 0], ["a", 1, 1]],
        [[0, 0, 0], [1, float("inf"), 1]],
        [[0, 0, 0], [-5, -1, -1]],
        [[0, 9, 9], [5, 1, 1]],
        [[0, 0, 0], [0, 5, 5]],
        [[True, None, []]],
        [[10**400, 1, 1]],
    ],
    ids=str,
)
def test_a_course_that_is_none_shows_the_speed_of_the_whole_job(course):
    [found] = speeds_of([{"course": course, "tokens": 8}], [4.0])
    assert (found.start, found.new) == (0.0, 2.0) or found.stop > 0


def test_facts_agree_with_inspect_and_name_ten_rows_from_all_over(run, capsys):
    facts = facts_of(run)
    main(["inspect", "--json", str(run)])
    told = json.loads(capsys.readouterr().out)
    assert facts.state == "finished" and facts.ended == told["finish_reasons"]
    assert [one.count for one in facts.errors] == [one["count"] for one in told["errors"]] == [6]
    assert [id for id, _ in facts.errors[0].examples] == ["row-9", "row-19", "row-29"]
    rows = [one.row for one in facts.generations]
    assert (
        len(rows) == 10 and rows[0] == 0 and rows[-1] == 58 and all(one.status == "done" for one in facts.generations)
    )
    assert dict(facts.ran)["devices"] == "2 ranks: node3 cuda:0, node3 cuda:1" and dict(facts.ran)["model"] == "m.h5"
    assert (
        facts.terms and len(facts.ranks) == 2 and facts.assumed == ["matmul"] and facts.speeds and len(facts.jobs) == 1
    )


def test_the_terminal_has_every_section(run, capsys):
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert titles[0] == f"{run}: finished" and titles[1:] == [
        "5 of 60 rows ended at max_new_tokens (8): raise it if they should go on",
        "what ran",
        "planned and measured (rates assumed, not measured)",
        "where the time went",
        "where each rank's time went",
        "over the links",
        "generated tokens/s over time",
        "tokens of a prompt",
        "tokens generated for a row",
        "rows by finish reason ('none': stopped half-way)",
        "errors (1 kind)",
        "10 generations",
        "jobs",
    ]
    assert re.search(r"rank 0 +p{8}d{30}\.\. ", out) and re.search(
        r"decode, tokens/s +250\.0 +200\.0 +-20 %  bound by link  <-", out
    )
    assert re.search(r"error  #{4} +6\n", out) and "row-9: the prompt is empty" in out


def test_an_unfinished_output_is_told_as_far_as_it_is(tmp_path, capsys):
    parts = Parts(tmp_path / "run.h5", {"sampling.max_new_tokens": 8, "prompts": "xxh3-128 of 40 bytes"})
    parts.begin(SEGMENT | {"of": 9, "prompts": ["/data/a.jsonl", "/data/b.jsonl"]})
    parts.computed(40, 30)
    fill(parts, [make_row(row) for row in range(5)])
    fill(parts, [make_row(6, status="todo", num_tokens=3), make_row(7, status="error")])
    facts = facts_of(tmp_path / "run.h5")
    assert "not finished" in facts.state and facts.ended == {"stop": 3, "length": 2, "error": 1}
    assert len(facts.generations) == 5 and facts.errors[0].count == 1 and not facts.terms and not facts.ranks
    assert dict(facts.ran)["prompts"] == "/data/a.jsonl, /data/b.jsonl"
    assert facts.speeds and dict(facts.ran)["rows"].startswith("5 done, 1 error, 3 left")
    assert main(["report", str(tmp_path / "run.h5")]) == 0 and "not finished" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run.h5"), "--html", str(tmp_path / "run.html")]) == 0
    assert "not finished" in (tmp_path / "run.html").read_text()


def test_an_output_without_rows_or_anything_else_is_told_too(tmp_path):
    parts = Parts(tmp_path / "run.h5", {})
    merge(parts, tmp_path / "run.h5", 0, {})
    facts = facts_of(tmp_path / "run.h5")
    assert next(lines_of(facts)).endswith("run.h5: finished") and "<h2>What ran</h2>" in page_of(facts)
    assert not facts.generations and facts.lengths is None and not facts.speeds


# What it refuses.


def test_what_is_no_output_and_what_is_no_page_are_refused(run, tmp_path, capsys):
    for target, words in (
        ("run.h5", "name it run.html"),
        ("prompts.jsonl", "name it prompts.html"),
        ("no/run.html", "no folder"),
    ):
        assert main(["report", str(run), "--html", str(tmp_path / target)]) == 2
        assert words in capsys.readouterr().err and not os.listdir(tmp_path)
    assert main(["report", str(tmp_path / "none.h5")]) == 2 and "there is no such file" in capsys.readouterr().err
    (tmp_path / "text.h5").write_text("hello")
    assert main(["report", str(tmp_path / "text.h5"), "--html", str(tmp_path / "a.html")]) == 2
    assert os.listdir(tmp_path) == ["text.h5"]


GARBAGE = [
    "not json",
    "7",
    "[]",
    "null",
    '{"predicted": 7, "memory": 7}',
    '{"predicted": [], "memory": [7, {"gpu": 7}, {"cpu": {"x": "y"}}], "dtype": 7, "laps": "many"}',
    '{"predicted": {"prefill": 7, "decode": {"tokens_per_second": 1e999, "binds": 7}, "rows": true, "assumed": 7}}',
    '{"predicted": {"decode": {"tokens_per_second": -1, "round_seconds": 0}, "tokens_per_second": 1' + "0" * 400 + "}}",
    "[" * 100_000,
    '{"predicted": {"assumed": [{"a": 1}], "device": []}, "num_ranks": 1e300}',
]


@pytest.mark.parametrize("plan", GARBAGE, ids=lambda plan: plan[:40])
def test_attributes_that_hold_anything_are_told_as_far_as_they_can_be(run, tmp_path, plan):
    output = shutil.copy(run, tmp_path / "run.h5")
    with h5py.File(output, "a") as file:
        for name in ("plan", "versions", "devices", "run_file", "start"):
            file.attrs[name] = plan
        file.attrs["segments"] = json.dumps(
            [{"start": "x", "devices": {"a": 1}, "job_ids": {"<b>": [1]}, "hosts": [[1], None]}, 7]
        )
    facts = facts_of(output)
    assert list(lines_of(facts)) and check_page(page_of(facts))


@pytest.mark.parametrize(
    "timing",
    [
        {"seconds": np.array(["a", "b"], object)},
        {"seconds": np.array([[1.0, 2.0]]), "waited": np.array([np.nan, 1.0])},
        {name: np.full(2, np.inf) for name in TIMING},
        {name: np.full(2, np.nan) for name in TIMING},
        {name: -np.array(values) for name, values in TIMING.items()},
        {name: np.array(values) * 1e290 for name, values in TIMING.items()},
        {name: np.zeros(number + 1) for number, name in enumerate(TIMING)},
        {name: np.zeros(3000) for name in TIMING},
        {"decode_seconds": {"inner": np.array([1.0])}},
    ],
    ids=list("abcdefghi"),
)
def test_timings_that_are_anything_are_told_as_far_as_they_can_be(run, tmp_path, timing):
    output = shutil.copy(run, tmp_path / "run.h5")
    with h5py.File(output, "a") as file:
        del file["timing"]
        write(file.create_group("timing"), timing)
    facts = facts_of(output)
    assert list(lines_of(facts)) and check_page(page_of(facts))


def test_of_shards_that_were_joined_no_plan_is_compared(run, tmp_path):
    output = shutil.copy(run, tmp_path / "run.h5")
    with h5py.File(output, "a") as file:
        file.attrs["shards"] = "[]"
    facts = facts_of(output)
    assert not facts.terms and len(facts.ranks) == 2


def write(group, values):
    for name, value in values.items():
        if isinstance(value, dict):
            write(group.create_group(name), value)
        else:
            group.create_dataset(name, data=value, dtype=h5py.string_dtype() if value.dtype.kind == "O" else None)


# What the page does with texts of anybody.

HOSTILE = [
    "</title><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<svg onload=alert(1)><style>*{display:none}</style>",
    '<meta http-equiv="refresh" content="0;url=http://example.com">',
    "</pre></details><iframe srcdoc='<script>alert(1)</script>'></iframe><base href='//x'>",
    "<!-- --!> ]]> <![CDATA[ <form action=//x><input autofocus onfocus=alert(1)>",
    "&lt;b&gt; &amp; &#x202e; {{7*7}} ${7*7} javascript:alert(1)",
    "\u202eright to left\u202c \u2066isolate\u2069 \u061cmark \u200e\u200f",
    "\x1b]0;title\x07\x1b[2J bell \x08 \x7f \x85 \x9b31m \ufeff",
    "line one\nline two\r\nline\rthree\ttab",
    "Z\u0351\u036b\u0343\u036a" * 40,
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \U0001f468\u200d\U0001f469 \u4e2d\u6587",
    "x" * 20_000,
]


def hostile_rows():
    def row(number, text):
        own = json.dumps({text[:300]: text, "list": [text[:50]], "\ud800": "\ud800"})
        status = "error" if number % 2 else "done"
        reason = "error" if number % 2 else "stop"
        ids = np.arange(3, dtype=np.int32)
        return Generation(number, f"{number} {text}", 0, status, reason, text, text, ids, ids, text * (number % 2), own)

    return [row(number, text) for number, text in enumerate(text for text in HOSTILE for _ in range(2))]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    attrs = {
        "plan": PLAN | {"dtype": HOSTILE[0]},
        "devices": HOSTILE,
        "run_file": "\n".join(HOSTILE),
        "start": HOSTILE[1],
    }
    attrs |= {"versions": {"noria": HOSTILE[0], "mpi": HOSTILE[1]}}
    segment = {"devices": HOSTILE, "job_ids": {HOSTILE[0]: HOSTILE[1]}, "hosts": HOSTILE}
    folder = tmp_path_factory.mktemp("hostile")
    return finish(folder / "run <script>alert(1)<script>.h5", hostile_rows(), attrs, TIMING, segment)


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and the texts of those of one kind."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.pre, self._in = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self.pre.append("")
        self._in = self._in or tag == "pre"

    def handle_endtag(self, tag):
        self._in = self._in and tag != "pre"

    def handle_data(self, data):
        if self._in:
            self.pre[-1] += data


TAGS = set(
    "html head meta link title style body header h1 h2 p main section footer table tr th td small details summary pre".split()
)
TAGS |= set("bdi dl dt dd div span i b svg path rect line".split())
ATTRIBUTES = set(
    "lang charset http-equiv content name rel href class dir scope open style title role viewbox preserveaspectratio".split()
)
ATTRIBUTES |= set("d x y x1 x2 y1 y2 width height".split())


def check_page(text):
    """Nothing but what a report's page may have; its parsed form."""
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert {name for _, attributes in page.tags for name in attributes} <= ATTRIBUTES
    metas = [attributes for tag, attributes in page.tags if tag == "meta"]
    assert [one["content"] for one in metas if "http-equiv" in one] == [POLICY] and metas[1].get("content") == POLICY
    assert POLICY == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert [attributes["href"] for _, attributes in page.tags if "href" in attributes] == ["data:,"]
    styles = {attributes["style"] for _, attributes in page.tags if "style" in attributes}
    assert all(re.fullmatch(r"width:\d+\.\d\d%", one) for one in styles)
    assert not re.search(f"[{SPECIAL}]", text) and len(text.encode()) < 3e6
    return page


def shown(text, most):
    """A text as the page should show it: what steers as escapes, what is too long cut."""
    cut = text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} characters more]"
    return re.sub(f"[{SPECIAL}\r]", lambda match: match[0].encode("unicode_escape").decode(), cut)


def test_hostile_texts_are_shown_and_are_no_tags(hostile):
    page = check_page(page_of(facts_of(hostile)))
    done = [row for row in hostile_rows() if row.status == "done"]
    texts = {shown(row.text, 4000) for row in done}
    assert sum(text in page.pre for text in texts) >= 10
    errors = {shown(row.error, 1000) for row in hostile_rows() if row.error}
    assert sum(text in page.pre for text in errors) == len(errors)


def test_hostile_texts_steer_no_terminal(hostile):
    lines = list(lines_of(facts_of(hostile)))
    assert not [line for line in lines if re.search(f"[{SPECIAL}\n\t]", line)]
    assert "\\u202eright to left" in "\n".join(lines) and "\\u061cmark" in "\n".join(lines)


def test_own_columns_are_a_table_and_broken_ones_their_text(tmp_path):
    rows = [make_row(0), make_row(1)]
    rows[0].extra, rows[1].extra = json.dumps({"label": "<i>", "n": [1, 2], "t": "x" * 3000}), "[broken"
    text = page_of(facts_of(finish(tmp_path / "run.h5", rows)))
    assert (
        '<th scope="row">label</th><td>&lt;i&gt;</td>' in text
        and "<td>[1, 2]</td>" in text
        and ">[broken</pre>" in text
    )
    assert "x" * COLUMNS in text and "x" * (COLUMNS + 1) not in text


# In a browser.

CHROMIUM = shutil.which("chromium")
PLAIN = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]


def browse(path, folder):
    """The page's content as the browser has it, and what its console said."""
    command = [CHROMIUM, *PLAIN, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_a_browser_shows_a_hostile_report_as_it_is_without_a_word_on_its_console(hostile, tmp_path):
    assert main(["report", str(hostile), "--html", str(tmp_path / "run.html")]) == 0
    dom, console = browse(tmp_path / "run.html", tmp_path)
    assert console == []
    written = Page((tmp_path / "run.html").read_text())
    seen = Page(dom)
    assert [tag for tag, _ in seen.tags if tag != "tbody"] == [tag for tag, _ in written.tags]
    assert [text.lstrip("\n") for text in seen.pre] == [text.lstrip("\n") for text in written.pre]
    # The same browser complains where a page tries what the policy forbids: silence says something.
    (tmp_path / "bad.html").write_text(
        (tmp_path / "run.html").read_text().replace("</main>", "<script>1</script></main>")
    )
    assert browse(tmp_path / "bad.html", tmp_path)[1]


@pytest.mark.alone
@pytest.mark.slow
def test_a_report_of_ten_thousand_rows_takes_less_than_two_seconds_and_three_megabytes(tmp_path):
    rows = [make_row(row, status="error" if row % 50 == 0 else "done") for row in range(10_000)]
    for row in rows:
        row.text, row.error = f"{row.text} some words" * 40, row.error and f"{row.error} {row.id} " * 30
    output = finish(tmp_path / "run.h5", rows, {"plan": PLAN}, TIMING)
    taken = []
    for arguments in (["--html", str(tmp_path / "run.html")], []):
        before = seconds_of_children()
        done = subprocess.run(
            [sys.executable, "-m", "noria", "report", str(output), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        taken.append(seconds_of_children() - before)
    assert max(taken) < 2, taken
    assert len(check_page((tmp_path / "run.html").read_text()).tags) > 100 and len(done.stdout.splitlines()) > 60


def seconds_of_children():
    """Of the processor, which other work on the machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
