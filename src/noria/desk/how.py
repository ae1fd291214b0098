"""What is told of a run: of its plan before it begins, and in its output how it was made."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from noria.config import Config
from noria.desk.examination import Examined
from noria.desk.inputs import prompts_of
from noria.desk.products import told
from noria.model import OpenModel
from noria.plan.plan import Plan
from noria.plan.written import otherwise
from noria.tools.provenance import provenance


def remarks(config: Config, device: str, num_rows: int, plan: Plan) -> Iterator[str]:
    """The plan, and what the user may not have meant."""
    # Nobody can assume what a CPU does.
    yield from plan.lines(predicted=device == "cuda" or config.job.machine is not None)
    if config.job.planned:
        yield otherwise(config.job.planned, plan)
    if config.placement.stage and not any("disk" in tiers.values() for tiers in plan.weight_tiers):
        yield "note: placement.stage does nothing: no weights are on disk"
    yield from told(config)
    if not num_rows:
        yield f"warning: {prompts_of(config)} has no rows"


def how_made(config: Config, work: Examined, plan: Plan, model: OpenModel, ran: Mapping[str, Any]) -> dict[str, Any]:
    """How the output was made: its attributes. ran: launcher, mpi_library, devices and start of the job."""
    more: dict[str, Any] = {"prompt_files": work.prompt_files} if work.prompt_files else {}
    more |= {"adapter": model.adapter} if model.adapter else {}
    more |= {name: value for name in ("kv_cache_dtype", "products") if (value := getattr(config, name)) != "auto"}
    return provenance(
        run_file=config.to_toml(),
        checkpoint_hash=model.header_hash,
        prompts_hash=work.prompts_hash,
        argv=sys.argv,
        plan=plan.as_dict(),
        **ran,
        **more,
    )
