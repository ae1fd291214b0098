"""Run in a process of its own: a checkpoint's header with bytes changed, opened as `noria inspect` opens it.

Usage: fuzz_worker.py MODEL.h5 FOLDER SEED EXAMPLES. Ends with 0 if every file was read or refused in one line.
"""

import sys
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hostile import repaired
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.summary import describe
from noria.errors import InputError
from noria.tools import container, looking

MODEL, FOLDER, SEED, EXAMPLES = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
CONTENT = MODEL.read_bytes()
# Where the bytes are that say something: not in the numbers, which are checked when they are loaded.
PLACES = [at for at in range(len(CONTENT)) if any(CONTENT[at - 4 : at + 2])]
with open_checkpoint(MODEL) as whole:
    DATA = [(e.offset, e.offset + e.nbytes) for e in whole._extents.values()]
    DATA += [(at := CONTENT.find(text), at + len(text)) for text in whole.tokenizer.values()]
PLACES = [at for at in PLACES if not any(first <= at < last for first, last in DATA)]

change = st.tuples(
    st.sampled_from(PLACES), st.sampled_from(["byte", "bit", "ones", "zeros", "number"]), st.integers(0, 255)
)


def changed(changes):
    content = bytearray(CONTENT)
    for at, kind, value in changes:
        if kind == "byte":
            content[at] = value
        elif kind == "bit":
            content[at] ^= 1 << value % 8
        else:
            width = (1, 2, 4, 8)[value % 4]
            new = {
                "ones": b"\xff" * width,
                "zeros": bytes(width),
                "number": (1 << value % (8 * width)).to_bytes(width, "little"),
            }
            content[at : at + width] = new[kind][: len(content) - at]
    return content


@seed(SEED)
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(change, min_size=1, max_size=4), st.booleans())
def test(changes, repair):
    content = changed(changes)
    path = FOLDER / "model.h5"
    path.write_bytes(repaired(content) if repair else content)
    (FOLDER / "last").write_text(repr((changes, repair)))
    try:
        with open_checkpoint(path) as checkpoint:
            describe(checkpoint)
            for name in checkpoint.blocks:
                checkpoint.verify_block(name)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 900, str(error)
        counts["refused"] += 1
    else:
        counts["read"] += 1


counts = {"refused": 0, "read": 0}
if __name__ == "__main__":
    looking.Looker.close = lambda self: None
    shared = looking.Looker()
    container.Looker = lambda: shared  # one child for all files
    test()
    print(counts)
