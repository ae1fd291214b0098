"""Rank 0's own work: prompts in, finished rows out.

Knows the files and the sequences; nothing of steps, devices or messages.
"""

import errno
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from noria.config import Config
from noria.desk.capacity import capacity_of
from noria.desk.earlier import Begun, agree, chat_date, earlier_lengths, make_room, of_running
from noria.desk.examination import Examined
from noria.desk.exports import paths_of_prompts, write_exports
from noria.desk.old_rules import texts_again
from noria.desk.pace import Pace, expected
from noria.desk.records import generation
from noria.errors import Changed, InputError
from noria.model import OpenModel
from noria.output.agreement import ANEW
from noria.output.compact import Compactor
from noria.output.merge import merge
from noria.output.outcome import how_to_read, outcome_of
from noria.output.parts import Parts
from noria.output.segments import history
from noria.plan.plan import Plan
from noria.rows import sequence as sequences
from noria.rows.admission import Admission
from noria.rows.chat import Encoder, encoder_of
from noria.rows.encoded_ahead import EncodedAhead
from noria.rows.making import Source
from noria.rows.prompt_files import Watch
from noria.rows.prompts import Prompt, noted, open_prompts
from noria.rows.tokenizer import tokenizer_of
from noria.sampling import OLD_RULES
from noria.tools.helper import Helper
from noria.tools.log import log
from noria.tools.progress import Progress
from noria.tools.text import plural
from noria.tools.values import shard_rows
from noria.tools.writing import WriteError

WAIT_SECONDS = 0.01  # between two looks whether the disk has caught up with the run


class Stopper(Protocol):
    """Whoever ends the run in time: `seconds_left` until then, and a thread that calls `tend` soon after a `nudge`."""

    @property
    def seconds_left(self) -> float: ...

    def nudge(self) -> None: ...


class Desk:
    """Prompts, tokenizer, parts and progress of a run around its Admission.

    Whoever touches the admission holds `lock`: `stop` comes from another thread. Rows are sealed by the thread that calls
    `tend`, about every second and when `stopping` is nudged; without one they are sealed in place, and no time runs out.
    `helper` renders conversations. Raises InputError if the parts beside the output are of another run, or the disk takes
    nothing.
    """

    def __init__(
        self,
        config: Config,
        examined: Examined,
        plan: Plan,
        checkpoint: OpenModel,
        segment: Mapping[str, Any],
        helper: Helper | None = None,
        stopping: Stopper | None = None,
    ):
        self._config, self._checkpoint, self._identity = config, checkpoint, examined.identity
        self._files, self._watch, self._all_read = examined.files, Watch(examined.files), False
        self._helper, self._mended = helper, examined.mended
        self.sampling = examined.identity.sampling
        self._expected = expected(plan, examined.load)
        self._num_prompts, self._rows = examined.num_rows, shard_rows(config.job.shard, examined.num_rows)
        self._tokenizer = tokenizer_of(checkpoint)
        self.lock = threading.RLock()
        self._stopping = stopping
        # Held while the run goes on with what `tend` does; taken after `lock`, before that of parts.
        self._tending = threading.Lock()
        self._failure: Exception | None = None  # of `tend`: the next step raises it
        self._pace = Pace(plan.groups)
        self._dropped = self._stopped = self._merging = False
        self._logprobs_dtype = np.float64 if plan.dtype == "float64" else np.float32
        self.code = 0  # the job's exit code, once the output is whole
        try:
            self._begin(plan, segment)
        except WriteError as error:  # nothing is lost yet: refused, as any other place that cannot be written
            raise InputError(str(error)) from error

    def _begin(self, plan: Plan, segment: Mapping[str, Any]) -> None:
        make_room(self._config)
        self._parts = Parts(self._config.output, self._identity.header)
        try:
            self._open(plan, segment)
        except BaseException:
            self._parts.withdraw()
            raise

    def _open(self, plan: Plan, segment: Mapping[str, Any]) -> None:
        """From the parts that are there to the admission of what is left; last of all the record of this job."""
        config, parts = self._config, self._parts
        agree(parts, config, self._files, self._num_prompts, self._checkpoint.tokenizer, self._mended)
        num_rows = len(self._rows) * self.sampling.n
        self._compactor = Compactor(parts)
        done = parts.done() if config.job.retry_errors else parts.finished()
        begun = Begun(parts)
        self._progress = Progress(num_rows, len(done), expected=self._expected)
        todo = lambda prompt: not prompt.error and (prompt.row, 0) not in done  # noqa: E731
        prompts = noted(self._prompts(), self._note)
        self._ahead = EncodedAhead(prompts, begun.encoder(self._encoder(plan.num_ranks)), todo)
        source = Source(
            self._ahead.prompts,
            len(self._rows) - len(done) // self.sampling.n,
            self._ahead.encode,
            self._finish,
            self._tokenizer,
            begun.take_up,
            done,
            earlier_lengths(parts, begun),
        )
        capacity = capacity_of(plan, self._checkpoint.shape, config.pipeline.prefix_sharing)
        ends, rules = self._tokenizer.end_token_ids, self._identity.rules
        self.admission = Admission(source, self.sampling, ends, capacity, rules)
        parts.begin({**segment, "of": num_rows, "prompts": paths_of_prompts(config)})

    @property
    def complete(self) -> bool:
        """Every row of the run is finished. Asked when no step is under way."""
        with self.lock:
            return not self._dropped and self.admission.exhausted

    def stop(self, reason: str) -> tuple[str, float]:
        """Drops what is in flight and seals it with its tokens so far. Returns words for the user and the seconds of a round."""
        with self.lock:
            if self._merging:
                return "every row is sealed", 0.0
            self._stopped = True
            unfinished = self.admission.stop()
            self._tell_lengths()
            self._dropped = self._dropped or bool(unfinished)
            waiting = sum(row.status != "todo" for row in list(self._parts.pending))
            begun = [sequence for sequence in unfinished if sequence.token_ids]
            for sequence in begun:
                self._parts.add(generation(sequence, self._tokenizer, self._logprobs_dtype))
            self._seal()
            self._parts.end(reason)
        words = f"{plural(waiting, 'finished row')} and {plural(len(begun), 'row')} half-way are sealed"
        return words, self._pace.round_seconds

    def leave(self) -> None:
        """Says how far a run came that stops before its end."""
        self._ahead.close()
        with self.lock, self._tending:
            self._tell_lengths()
            self._seal()
            self._merging = True  # nothing is left to tend
            if not self._stopped:  # by a signal: admission ended in time for the walltime
                self._parts.end("walltime")
        self._progress.end(self._config.output)

    def withdraw(self, kind: object, error: BaseException | None, trace: object) -> None:
        """The way out after an error: a run that was refused before any row was sealed leaves nothing behind; one whose
        input changed seals what it has, which is of that input as it was."""
        self._ahead.close()
        if isinstance(error, Changed):
            log(0, 1, f"stopping ({error.path} changed): {self.stop('input changed')[0]}")
        if isinstance(error, InputError) and not self._parts.parts:
            self._parts.withdraw()

    def fail(self, message: str) -> None:
        """Records why the job ends, from any thread: what `noria inspect` says of it."""
        if not self._parts.taken_away():
            self._parts.end(" ".join(message.split())[:300])

    def tend(self) -> None:
        """From the thread that seals: brings to the disk what is due, and puts small parts together."""
        with self._tending:
            if self._merging or self._failure is not None:
                return
            try:
                if self._seal(self._config.job.seal_seconds):
                    self._compactor.compact_if_due()
                    self._look_at_the_prompts()
            except Exception as error:  # noqa: BLE001 - whatever it is, the run must end with it
                self._failure = error

    def tick(self) -> None:
        """Between two steps: has sealed what is due, shows how far the run is and looks at the time.

        Waits for the disk only where the run finishes rows faster than it takes them. Raises what `tend` met with.
        """
        with self.lock:
            counted = self.admission.counted
            unread = len(self._rows) - len(self.admission.samples)
            expected = self.admission.num_rows + unread * self.sampling.n
            self._progress.expect(expected)
            self._parts.expect(expected)
            shared = counted.cached_tokens
            self._progress.add(tokens=counted.tokens, prompt_tokens=counted.prompt_tokens, cached_tokens=shared)
            self._parts.computed(counted.prompt_tokens, counted.tokens)
            counted.tokens = counted.prompt_tokens = counted.cached_tokens = 0
            self._look_at_the_time()
            is_due = self._parts.is_due(self._config.job.seal_seconds)
            if is_due:
                self._tell_lengths()
        if is_due:
            self._nudge()
        while self._parts.is_full and self._failure is None and not self._stopped:
            self._nudge()
            time.sleep(WAIT_SECONDS)
        if self._failure is not None:
            raise self._failure

    def _tell_lengths(self) -> None:
        """With the next seal the next job can know how long the rows were that a kill loses."""
        if self._parts.segment:
            self._parts.segment.running = of_running(self.admission.lengths())

    def _look_at_the_prompts(self) -> None:
        """Raises Changed if a file is another now and not all rows are read. What is read is what was hashed in any case:
        the run need not work on until it comes to what is gone."""
        if not self._all_read and (changed := self._watch.changed()):
            raise Changed(changed.path)

    def _nudge(self) -> None:
        if self._stopping is not None:
            self._stopping.nudge()
        else:
            self.tend()

    def _look_at_the_time(self) -> None:
        """Admits nothing more when what is left would not be worth a row's prefill."""
        left = self._stopping.seconds_left if self._stopping else float("inf")
        if not self._pace.step(left):
            self.admission.admit_no_more()

    def _seal(self, due: float | None = None) -> Path | None:
        """Seals what waits, now or if `due` seconds have passed. Raises WriteError with what was lost and what to do."""
        parts = self._parts
        if parts.taken_away():
            what, remedy = "the sealed parts were removed during the run", "put them back, or start the same run again"
            raise WriteError(errno.ENOENT, what, parts.folder, remedy)
        try:
            return parts.seal() if due is None else parts.seal_if_due(due)
        except WriteError as error:
            lost = f"{plural(len(parts.pending), 'row')} could not be sealed, sealed rows are kept"
            raise error.about(parts.folder, f"{lost}: make room and start the same run again") from error

    def close(self, attrs: Mapping[str, Any], timings: Sequence[Mapping[str, float]]) -> None:
        """Merges the parts into the output, with a column of `timings` (one a rank) each, and says what was done."""
        self._ahead.close()
        columns = {name: np.array([timing[name] for timing in timings]) for name in timings[0]}
        with self.lock, self._tending:
            self._seal()
            self._parts.end("finished")
            self._merging = True  # from here on the parts may go at any moment
        attrs = {**attrs, **history(self._parts.folder), "seed": self.sampling.seed, "prompt_rows": self._num_prompts}
        attrs |= {"model_sampling": self._identity.taken}
        again = None
        if self._identity.rules == OLD_RULES:
            prompts = open_prompts(self._files)
            again, attrs["texts"] = texts_again(prompts, self.sampling, self._tokenizer), ANEW
        samples = np.array(self.admission.samples)
        if changed := self._watch.changed():
            self._note(f"prompts {changed} changed after its rows were read: the output is of the file as it was")
        merge(self._parts, self._parts.output, self._rows, attrs, columns, samples, again)
        outcome = outcome_of(self._config.output)
        self.code = outcome.code(self._config.job.fail_on_errors)
        self._progress.end(self._config.output, [*outcome.lines(), how_to_read(self._config.output)])
        write_exports(self._config, partial(log, 0, 1))

    def _prompts(self) -> Iterator[Prompt]:
        """The rows of this run, as they are read."""
        yield from (prompt for prompt in open_prompts(self._files) if prompt.row in self._rows)
        self._all_read = True

    def _note(self, message: str) -> None:
        log(0, 1, f"note: {message}")

    def _finish(self, sequence: sequences.Sequence) -> None:
        row = generation(sequence, self._tokenizer, self._logprobs_dtype)
        self._parts.add(row)
        self._progress.add(rows=1, errors=row.status == "error", finished_tokens=len(row.token_ids))

    def _encoder(self, num_ranks: int) -> Encoder:
        date, say = chat_date(self._parts.header), partial(log, 0, num_ranks)
        return encoder_of(self._checkpoint, self._tokenizer, self.sampling, date, say, self._helper)
