"""Seconds of what a rank does in a round, term by term: from bytes, FLOPs and counts, by the machine's rates.

What the engine reaches of a rate, and what no rate says, stands here with the measurement that it comes from (one H200;
jobs/bench/README.md). Knows no plan and no model.
"""

from noria.plan.rates import Rates

# Products within layers, in runs of seconds: a step of 16,384 tokens of a Llama-8B shape takes 430 ms, the prefill of 65,536
# tokens of an OPT-30B shape with streamed random weights 7.45 s.
MATMUL_SHARE = 0.87
# A product of one row reads its matrix at 0.88 of a copy's rate.
WEIGHTS_SHARE = 0.88
# Attention of decoding rows by torch's flash kernel: 2.3 of 4.3 TB/s (1,024 rows x 576 tokens), 0.4 (16 x 576) to 0.6.
CACHE_SHARE = 0.54
# Attention of chunks by it: 0.37 of a product's rate for prompts of 2,048 tokens, 0.42 for 8,192, 138 TFLOP/s for 512.
CHUNK_SHARE, CHUNK_HALF = 0.47, 350.0
# Norms, rotary, activations, residual sums: what all inputs and outputs of a layer's products take, so many times.
PASSES = 4.0
# The same of a mixture's experts (sorting, gathering, summing pairs of token and expert; tiles that are not full), and what a
# layer of them takes on the device and of the host however few tokens there are (128 experts of 768 x 2048, 8 a token, by tiles,
# 16 to 16,384 tokens; the host's share was measured with grouped products).
MIXTURE_PASSES, MIXTURE_SECONDS, MIXTURE_LAUNCHES = 1.1, 0.01e-3, 0.4e-3
# A layer's views, checks and kernels, in what the machine's `layer_seconds` is (kernels alone): a step of 16 rows and 32
# layers takes 10.6 ms on the host.
LAUNCHES = 2.0
# Probabilities, their sum, the draw: 4.2 ms for 1,024 rows of 128,256 ids.
LOGIT_NBYTES = 136
# Rank 0 takes a step's results and composes the next: about 4 us a row on one core, twice that for what goes to the device.
# With a single group it also waits until it sees that a result is there.
STEP_SECONDS, ROW_SECONDS, WAIT_SECONDS = 0.3e-3, 1e-5, 0.7e-3

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
    """Weights that products read, and what copies and decoding read and write."""
    return nbytes / (rates.device_memory * WEIGHTS_SHARE)


def decoding(nbytes: float, rates: Rates) -> float:
    """Encoded parameters that are read, and the numbers that are written."""
    return device_memory(nbytes, rates) / (CPU_DECODING_SHARE if rates.device == "CPU" else 1)


def matmul(flops: float, rows: float, dtype: str, rates: Rates) -> float:
    """Products of so many rows each."""
    return flops / (rates.matmul_at(dtype, rows) * MATMUL_SHARE)


def cache_reading(nbytes: float, rates: Rates) -> float:
    """Attention of decoding rows: it reads their cache once."""
    return nbytes / (rates.device_memory * CACHE_SHARE)


def chunks(flops: float, context: float, dtype: str, rates: Rates) -> float:
    """Attention of chunks of prompts, whose tokens look at so many others on average."""
    return flops / (rates.matmul[dtype] * CHUNK_SHARE * (context + 1) / (context + CHUNK_HALF))


def elementwise(nbytes: float, expert_nbytes: float, rates: Rates) -> float:
    """Kernels between products, from the bytes of the products' inputs and outputs; of experts' apart."""
    return (PASSES * nbytes + MIXTURE_PASSES * expert_nbytes) / rates.device_memory


def sampling(logits: float, rates: Rates) -> float:
    return logits * LOGIT_NBYTES / rates.device_memory


def launches(layers: float, mixtures: float, rates: Rates) -> float:
    """The host's time for the kernels of so many layers and microbatches; `mixtures`: those of them with experts."""
    return layers * rates.layer_seconds * LAUNCHES + mixtures * MIXTURE_LAUNCHES


def host(groups: int, rows: float) -> float:
    """Rank 0's time between the results of all groups' steps and the next ones."""
    return groups * STEP_SECONDS + rows * ROW_SECONDS + (groups == 1) * WAIT_SECONDS


def hop(nbytes: float, rates: Rates) -> float:
    """A message from rank to rank."""
    return rates.hop_seconds + HAND_OVER_SECONDS + nbytes / rates.hop
