"""Numbers that several rooms keep: what the plan counts and the engine does, each said once."""

DTYPES = ("float64", "float32", "bfloat16", "float16")
TIERS = ("gpu", "cpu", "disk")
MAX_GROUPS = 8_000  # MPI promises tags up to 32767: three kinds of messages are numbered by group

# Of the rows in flight, one in so many must have ended before others are admitted: on average half as many places are empty.
GATHERED = 32
RUN_PAGES = 4  # every run of pages of a row but its last is a multiple of it: 64 tokens, attention's key block
BESIDE_RINGS = 128  # tokens that a chunk may take beside the rings of windows, more than it has and a ring holds

MEMORY_SHARE = 0.9  # of the memory that is free, for a run: the rest is for the libraries' own needs
HOST_NBYTES = 4 * 1024**3  # of host memory that a rank takes for itself: libraries, the device's context, prompts

STORED_ROWS = 64  # of hidden states that are multiplied with encoded weights as these are stored, at most
LOGITS_ROWS = 512  # rows whose logits the last rank holds at a time: 512 x 128k ids in float32 are 256 MiB
DRAW_ELEMENTS = 2**24  # logits that are sorted and summed in float64 at a time: 128 MiB
DRAW_NBYTES = 4 * 8 * DRAW_ELEMENTS  # of their sorted and cumulated copies
# Of attention's partial results: those of sections that are computed apart, and as much of shared beginnings.
PARTIAL_NBYTES = 128 << 20
ACTIVATION_SLOTS = 3  # buffers of a microbatch for hidden states in CPU memory: no schedule has more cells under way
DECODED_NUMBERS = 2**20  # of a parameter that torch decodes at a time: what is in between stays in a cache
# Encodings of which kernels multiply experts as they are stored, a program decoding its own tiles, for so many rows of an expert
# on average: for more they are decoded before. At 64 that takes 1.9, 6.3 and 0.64 ms where decoding and multiplying take 4.7,
# 16.7 and 1.32 (mxfp4, fp8 blocks, int4; shapes of gpt-oss-120b, DeepSeek-V3, Qwen3-30B-A3B; one H200).
IN_TILES, STORED_PAIRS = ("fp8_block", "fp8_channel", "int4", "int8", "mxfp4", "nvfp4"), 128
# Blocks that stream from CPU memory or scratch may be coded without loss while they load: in this encoding, with as many bits
# a number as weights take, matrices of so many numbers.
CODED, CODED_BITS, CODED_NUMBERS = "exponent", 11.4, 1 << 16
LOADING_BUFFERS = 2  # host buffers of a block, for those that are not read where they stay
DISK_SLOTS = 4  # host buffers through which bytes go to and from a disk
DISK_SLOT_NBYTES = 64 << 20
DISK_NBYTES = DISK_SLOTS * DISK_SLOT_NBYTES
DISK_THREADS = 4  # that read and write them

GRAPH_ROWS = 2048  # that a step has at most which is captured as a graph: with more the host is never late
GRAPHS_NBYTES = 96 << 20  # of graphs themselves, and of libraries on the stream that captures them


def padded_rows(rows: int) -> int:
    """The size of graphs for so many rows: up to 16 a power of two, then a multiple of 8 and of an eighth of the power above."""
    power = 1 << (rows - 1).bit_length()
    step = power if power <= 16 else max(8, power // 8)
    return -(-rows // step) * step


def loaded_once(num_streamed: int, groups: int, slots: int) -> bool:
    """Whether a visit's streamed blocks are loaded once a round for all groups, not once a group."""
    return groups == 1 or num_streamed <= slots - 1
