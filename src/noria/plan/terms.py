"""Seconds of what a rank does in a round, term by term: from bytes, FLOPs and counts, by the machine's rates.

What the engine reaches of a rate, and what no rate says, stands here with the measurement that it comes from (one H200;
jobs/bench/README.md). Knows no plan and no model.
"""

from noria.limits import STORED_PAIRS, STORED_ROWS
from noria.plan.rates import Rates

# Products within layers, in runs of seconds: steps of 16,384 tokens of Llama-8B shapes compute 11.4 us a token and 16 layers.
# Beside copies: the prefill of 65,536 tokens of an OPT-30B shape with streamed random weights takes 7.45 s.
MATMUL_SHARE, STREAMED_SHARE = 0.92, 0.84
# A product of one row reads its matrix at 0.88 of a copy's rate.
WEIGHTS_SHARE = 0.88
# Attention of decoding rows by items reads the cache at 1.0 of a copy's rate (1,024 rows x 576 tokens, 64 x 4,096), with few
# keys at 0.8 (512 x 232) to 0.6 (16 x 576).
CACHE_SHARE = 0.92
# What rows of a step share is read once for many of them: 512 rows behind one beginning of 1,984 tokens, each with 248 of its
# own, take 0.299 ms a layer: a shared token costs a row a sixth of one of its own.
SHARED_SPEED = 6.0
# Attention of chunks by items: 0.45 of a product's rate for prompts of 2,048 tokens, 0.55 for 8,192.
CHUNK_SHARE, CHUNK_HALF = 0.58, 310.0
# Norms, rotary, activations, residual sums: what all inputs and outputs of a layer's products take, so many times; by fused
# kernels (half precisions on a GPU) and one by one.
PASSES, PLAIN_PASSES = 1.3, 4.0
HALF = ("bfloat16", "float16")
# The same on a CPU: of products in runs; of attention of chunks, for contexts of 64 to 1,024 tokens; of the rate at which
# products of one row read, of decoding rows. Passes of what stands between products. A call of attention takes 0.6 of what the
# small operations of a layer take (one thread of an EPYC).
CPU_MATMUL_SHARE, CPU_CHUNK_SHARE, CPU_CACHE_SHARE, CPU_PASSES, CALL_SHARE = 0.95, 0.36, 0.5, 3.8, 0.6
# What a layer takes on the device however few tokens there are: some 14 kernels, one after another.
LAYER_SECONDS = 35e-6
# Products of experts by tiles, of a product's rate, and pairs of token and expert that an expert's tiles have room for beside
# its own: 20.5 ms for 16,384 tokens of GLM-5 (512 pairs an expert); 0.77 and 2.47 ms for 4,096 and 16,384 of Qwen3-30B-A3B
# (256 and 1,024 pairs). What sorts, gathers and sums pairs, and what a layer of experts takes on the device and of the host
# however few tokens there are (128 experts of 768 x 2048, 8 a token; the host's share was measured with grouped products).
EXPERTS_SHARE, EXPERTS_SPARE, MEASURED_PAIRS = 0.76, 64, 1024
MIXTURE_PASSES, MIXTURE_SECONDS, MIXTURE_LAUNCHES = 0.3, 0.01e-3, 0.4e-3
# Experts that are multiplied as they are stored, of what reading their numbers at a copy's rate takes: those of gpt-oss-120b,
# DeepSeek-V3 and Qwen3-30B-A3B in mxfp4, fp8 blocks and int4, of 512 tokens. The pairs of an expert beyond half so many lie in
# several tiles, each of which decodes its expert: 6.3 ms for 64 of DeepSeek-V3 (4.9 for 16), 11.1 ms for 128 of GLM-5. Small
# experts in int4 take up to 1.8 times as long (Qwen3-30B-A3B: 0.28 ms for 16, 0.66 for 64).
STORED_EXPERTS, STORED_TILE = 0.7, 56
# Where experts are loaded when they are chosen, the host reads the choice and queues their copies, and the link and the device
# stand still meanwhile: a round of 8 rows, 12 layers of 128 experts takes 6.6 ms more than its bytes, 2.9 of them computing.
CHOOSING_SECONDS = 0.3e-3
# A layer's views, checks and kernels, in what the machine's `layer_seconds` is (kernels alone): a step of 256 rows and 32
# layers takes 17 to 22 ms on the host. A graph of all of them: 1.2 to 1.9 ms with what is put into its buffers.
LAUNCHES, GRAPH_SECONDS = 3.7, 1.3e-3
# Drawing by a kernel: 0.8 ms for 1,000 rows of 128,256 ids at a temperature (0.3 greedy, 3.7 with top_p).
LOGIT_NBYTES = 27
# Rank 0 takes a step's results and composes the next: 1.4 ms for 256 rows, 3.5 for 1,024. A single group whose steps are not
# composed ahead also waits until it sees that a result is there.
STEP_SECONDS, ROW_SECONDS, WAIT_SECONDS = 0.7e-3, 2.8e-6, 0.7e-3
# A row that begins or ends, whatever is hidden: 4,096 rows of 64 + 32 tokens take 0.8 s more than all steps of them.
CHANGE_SECONDS = 0.1e-3
# Rank 0 takes a prompt in: 17 to 27 ms of a step of 100 to 114 prompts of 512 tokens; 30 ms of a round of 27 prompts in a ring,
# whose thread takes the interpreter in turn.
PROMPT_SECONDS, RING_PROMPT_SECONDS = 0.2e-3, 0.9e-3
# Of the launches of a step with chunks, the part that a GPU alone waits for: a round takes 40, 23 and 70 ms more than it
# computes, where 55, 32 and 90 ms are launches. All had four microbatches of 16,384 tokens, the largest that were measured.
SHOWN_LAUNCHES, MEASURED_TOKENS = 0.75, 2**14
# In a ring a visit of a step begins when its input is there: 0.8 ms of the host; and the last one draws: 1.2 ms.
INPUT_SECONDS, DRAW_SECONDS = 0.8e-3, 1.2e-3

HAND_OVER_SECONDS = 0.15e-3  # to the communication thread, and until it polls: 0.1 to 0.2 ms a message

# Decoding on a CPU: 0.8e9 numbers of FP8 a second on a core of an EPYC.
CPU_DECODING_SHARE = 0.25


def link(loaded: float, stored: float, rates: Rates) -> float:
    """Copies to the device and back: both at once as long as there are both."""
    both = min(loaded, stored)
    return (
        both / rates.both_directions + (loaded - both) / rates.host_to_device + (stored - both) / rates.device_to_host
    )


def disk(read: float, written: float, rates: Rates) -> float:
    return read / rates.disk_read + written / rates.disk_write


def device_memory(nbytes: float, rates: Rates) -> float:
    """Weights that products read, and what copies and decoding read and write. Of a CPU's memory products are the measure."""
    return nbytes / (rates.device_memory * (1 if rates.device == "CPU" else WEIGHTS_SHARE))


def decoding(nbytes: float, rates: Rates) -> float:
    """Encoded parameters that are read, and the numbers that are written."""
    return device_memory(nbytes, rates) / (CPU_DECODING_SHARE if rates.device == "CPU" else 1)


def stored_experts(pairs: float, dtype: str, rates: Rates) -> bool:
    """Whether experts of so many rows each are multiplied as they are stored."""
    return pairs <= STORED_PAIRS and dtype in HALF and rates.device != "CPU"


def stored_products(rows: float, dtype: str, rates: Rates) -> bool:
    """The same of other weights, by microbatches of so many rows."""
    return rows <= STORED_ROWS and dtype in HALF and rates.device != "CPU"


def matmul(flops: float, rows: float, dtype: str, rates: Rates, streamed: bool = False) -> float:
    """Products of so many rows each; `streamed`: beside copies of weights."""
    share = CPU_MATMUL_SHARE if rates.device == "CPU" else STREAMED_SHARE if streamed else MATMUL_SHARE
    return flops / (rates.matmul_at(dtype, rows) * share)


def experts(flops: float, pairs: float, dtype: str, rates: Rates, streamed: bool = False) -> float:
    """The same of a mixture's experts, each for so many pairs of token and expert; more than were measured gain nothing."""
    if rates.device == "CPU" or dtype not in HALF:  # one after another
        return matmul(flops, pairs, dtype, rates, streamed)
    share = EXPERTS_SHARE * (STREAMED_SHARE / MATMUL_SHARE if streamed else 1)
    tiles = 1 + EXPERTS_SPARE / min(max(pairs, 1), MEASURED_PAIRS)  # of those that the pairs fill
    return flops * tiles / (rates.matmul[dtype] * share)


def as_stored(nbytes: float, pairs: float, rates: Rates) -> float:
    """Experts of so many bytes, decoded, that are multiplied as they are stored, each for so many pairs."""
    tiles = max(0.5 + pairs / STORED_TILE, 1)
    return device_memory(nbytes * STORED_EXPERTS * tiles, rates)


def own_context(context: float, shared: float) -> float:
    """Tokens of its own that take a row as long as this context, so many tokens of which other rows share."""
    return context - shared + shared / SHARED_SPEED


def cache_reading(nbytes: float, rates: Rates) -> float:
    """Attention of decoding rows: it reads their cache once. Of one in fewer bits, which it decodes meanwhile, what it decodes is
    counted: fewer bytes are read, but the decoding binds."""
    return nbytes / (rates.device_memory * (CPU_CACHE_SHARE if rates.device == "CPU" else CACHE_SHARE))


def decodes_in_tiles(dtype: str, rates: Rates, values_within: bool = False) -> bool:
    """Whether attention decodes a cache in fewer bits itself, as it reads it; values that lie within keys are decoded before."""
    return dtype in HALF and rates.device != "CPU" and not values_within


def chunks(flops: float, context: float, dtype: str, rates: Rates) -> float:
    """Attention of chunks of prompts, whose tokens look at so many others on average."""
    share = CPU_CHUNK_SHARE if rates.device == "CPU" else CHUNK_SHARE * (context + 1) / (context + CHUNK_HALF)
    return flops / (rates.matmul[dtype] * share)


def elementwise(nbytes: float, expert_nbytes: float, dtype: str, rates: Rates) -> float:
    """Kernels between products, from the bytes of the products' inputs and outputs; of experts' apart."""
    passes = CPU_PASSES if rates.device == "CPU" else PASSES if dtype in HALF else PLAIN_PASSES
    return (passes * nbytes + MIXTURE_PASSES * expert_nbytes) / rates.device_memory


def least(layers: float, mixtures: float, rates: Rates) -> float:
    """What kernels of so many layers and microbatches take however little they do; `mixtures`: of those with experts."""
    return layers * LAYER_SECONDS * (rates.device != "CPU") + mixtures * MIXTURE_SECONDS


def sampling(logits: float, rates: Rates) -> float:
    return logits * LOGIT_NBYTES / rates.device_memory


def launches(layers: float, mixtures: float, rates: Rates) -> float:
    """The host's time for the kernels of so many layers and microbatches; `mixtures`: those of them with experts."""
    return layers * rates.layer_seconds * LAUNCHES + mixtures * MIXTURE_LAUNCHES


def calls(number: float, dtype: str, rates: Rates) -> float:
    """The host's time for calls of attention; none where one kernel computes all rows."""
    by_items = dtype in HALF and rates.device != "CPU"
    return 0.0 if by_items else number * rates.layer_seconds * CALL_SHARE


def choosing(mixtures: float) -> float:
    """The time between a router's choice and the copies of its experts, of so many layers."""
    return mixtures * CHOOSING_SECONDS


def replays(groups: int) -> float:
    """The host's time for steps that are captured as graphs."""
    return groups * GRAPH_SECONDS


def host(groups: int, rows: float, waits: bool) -> float:
    """Rank 0's time between the results of all groups' steps and the next ones; `waits`: until it sees that one is there."""
    return groups * STEP_SECONDS + rows * ROW_SECONDS + waits * WAIT_SECONDS


def prompts(begun: float, in_ring: bool) -> float:
    """Rank 0's time for prompts that it takes in."""
    return begun * (RING_PROMPT_SECONDS if in_ring else PROMPT_SECONDS)


def changes(begun: float, ended: float) -> float:
    """What the device waits for rows that begin and that end."""
    return (begun + ended) * CHANGE_SECONDS


def shown(launched: float, tokens: float) -> float:
    """What a GPU alone waits for the launches of a step with chunks, in microbatches of so many tokens. Larger ones than were
    measured are taken to show as much a token: the host launches a layer of them far faster than the device computes it."""
    return launched * SHOWN_LAUNCHES * max(tokens / MEASURED_TOKENS, 1)


def steps_in_ring(groups: int, laps: int, draws: bool) -> float:
    """What a rank's device waits for its host in the steps of these groups, in each lap."""
    return groups * (laps * INPUT_SECONDS + draws * DRAW_SECONDS)


def hop(nbytes: float, rates: Rates) -> float:
    """A message from rank to rank."""
    return rates.hop_seconds + HAND_OVER_SECONDS + nbytes / rates.hop
