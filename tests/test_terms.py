"""Each term of the cost model beside what was measured of it on one H200, with the rates that noria probe found there.

Measured figures are those of jobs/bench/README.md; "steps" is its table of a step's parts.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from noria.plan import rates, terms

H200 = rates.read(Path(__file__).parent / "data" / "noria-rates-h200.toml")
LLAMA_8B = 32 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)  # numbers of its layers
BETWEEN = 32 * 2 * ((6144 + 4096) + (4096 + 4096) + (28672 + 4096) + (4096 + 14336))  # bytes of a token


def test_a_link_streams_all_layers_of_opt_30b_in_the_seconds_of_a_decode_round():
    nbytes = 2 * (48 * 12 * 7168**2 + 50272 * 7168)
    assert terms.link(nbytes, 0, H200) == pytest.approx(1.082, rel=0.02)  # "all weights in CPU memory, 64 rows"


def test_two_directions_of_a_link_share_it_as_long_as_both_are_used():
    assert terms.link(3e9, 1e9, H200) == pytest.approx(1e9 / 5.073e10 + 2e9 / 5.53e10)
    assert terms.link(0, 1e9, H200) == pytest.approx(1e9 / 5.525e10)


def test_a_disk_reads_the_layers_of_opt_6_7b_past_the_page_cache():
    nbytes = 2 * 32 * 12 * 4096**2
    assert terms.disk(nbytes, 0, H200) == pytest.approx(
        nbytes / 1.97e9, rel=0.25
    )  # "weights on disk": 1.40 just before
    assert terms.disk(1e9, 1e9, H200) > terms.disk(1e9, 0, H200)


def test_a_product_of_one_row_takes_what_reading_its_matrix_takes():
    flops, nbytes = 2 * 8192**2, 2 * 8192**2
    assert terms.device_memory(nbytes, H200) == pytest.approx(flops / H200.matmul_at("bfloat16", 1), rel=0.05)


def test_products_of_a_prefill_step_take_what_they_took():
    found = terms.matmul(2 * 16384 * LLAMA_8B, 16384, "bfloat16", H200)
    assert found == pytest.approx(0.345, rel=0.12)  # steps: products alone 339 to 350 ms
    opt_30b = 2 * 32768 * 48 * 12 * 7168**2  # the prefill of 64 rows, whose weights are copied meanwhile
    assert terms.matmul(opt_30b, 4096, "float16", H200, streamed=True) == pytest.approx(3.88, rel=0.15)


@pytest.mark.parametrize(("rows", "tokens", "milliseconds"), [(1024, 576, 0.5585), (64, 4096, 0.2464)])
def test_attention_of_decoding_rows_reads_the_cache_as_fast_as_items_do(rows, tokens, milliseconds):
    nbytes = rows * tokens * 2 * 8 * 128 * 2
    assert terms.cache_reading(nbytes, H200) == pytest.approx(milliseconds / 1000, rel=0.15)


def test_a_beginning_that_rows_share_is_read_as_fast_as_it_was():
    nbytes = 512 * terms.own_context(1984 + 248, 1984) * 2 * 8 * 128 * 2
    assert terms.cache_reading(nbytes, H200) == pytest.approx(0.299e-3, rel=0.15)
    assert terms.own_context(576, 0) == 576


@pytest.mark.parametrize(("rows", "prompt", "milliseconds"), [(8, 2048, 0.7578), (2, 8192, 2.501)])
def test_attention_of_chunks_takes_a_share_of_a_products_rate_that_grows_with_their_length(rows, prompt, milliseconds):
    flops = 4 * rows * prompt * prompt / 2 * 32 * 128
    faster = replace(H200, matmul={"bfloat16": 803.8e12})  # of the same machine
    assert terms.chunks(flops, prompt / 2, "bfloat16", faster) == pytest.approx(milliseconds / 1000, rel=0.05)


def test_kernels_between_products_take_what_each_of_them_took():
    layer = 2 * 134.6e-6 + 325.2e-6 + 106.0e-6  # of 16,384 tokens: sums and norms, gates, heads
    assert terms.elementwise(16384 * BETWEEN, 0, "bfloat16", H200) == pytest.approx(32 * layer, rel=0.15)
    assert terms.elementwise(1e9, 0, "float32", H200) > 3 * terms.elementwise(1e9, 0, "float16", H200)


@pytest.mark.parametrize(
    ("tokens", "milliseconds"), [(16, 0.200), (64, 0.302), (512, 0.331), (1024, 0.385), (4096, 0.769), (16384, 2.471)]
)
def test_a_layer_of_a_mixture_takes_what_it_took_in_a_graph(tokens, milliseconds):
    expert, between = 3 * 768 * 2048, 2 * 8 * (2 * (768 + 2048) + (768 + 2048))
    read = 2 * 128 * expert * (1 - (1 - 8 / 128) ** tokens)
    pairs = tokens * 8 / 128 / (1 - (1 - 8 / 128) ** tokens)
    products = max(terms.device_memory(read, H200), terms.experts(2 * tokens * 8 * expert, pairs, "bfloat16", H200))
    found = terms.least(0, 1, H200) + products + terms.elementwise(0, tokens * between, "bfloat16", H200)
    assert found == pytest.approx(milliseconds / 1000, rel=0.15)


def test_experts_of_few_rows_in_float32_take_what_reading_them_takes():
    expert = 3 * 768 * 2048
    found = terms.experts(2 * 8 * expert, 1, "float32", H200)
    assert found == pytest.approx(2 * 8 * expert / (H200.matmul_at("float32", 1) * terms.MATMUL_SHARE))


def test_products_of_glm_5s_experts_take_what_they_took():
    flops = 2 * 16384 * 8 * 3 * 6144 * 2048
    assert terms.experts(flops, 512, "bfloat16", H200) == pytest.approx(20.5e-3, rel=0.15)
    assert terms.experts(flops, 512, "bfloat16", H200, streamed=True) > terms.experts(flops, 512, "bfloat16", H200)


@pytest.mark.parametrize(
    ("numbers", "pairs", "milliseconds"),
    [
        (128 * 3 * 2880**2, 4, 1.34), (128 * 3 * 2880**2, 16, 1.36), (128 * 3 * 2880**2, 64, 1.95),
        (256 * 3 * 7168 * 2048, 4, 4.73), (256 * 3 * 7168 * 2048, 16, 4.86), (256 * 3 * 7168 * 2048, 64, 6.33),
        (256 * 3 * 6144 * 2048, 128, 11.1),
    ],
)  # fmt: skip
def test_experts_take_as_they_are_stored_what_they_took(numbers, pairs, milliseconds):
    """gpt-oss-120b in mxfp4, DeepSeek-V3 and GLM-5 in fp8 blocks."""
    assert terms.as_stored(2 * numbers, pairs, H200) == pytest.approx(milliseconds / 1000, rel=0.15)


def test_the_host_takes_as_long_for_the_kernels_of_a_step_as_it_took():
    assert terms.launches(32, 0, H200) == pytest.approx(19.5e-3, rel=0.15)  # 256 rows without graphs: 17 to 22 ms
    assert terms.replays(1) == pytest.approx(1.3e-3)  # 256 rows: 1.68 ms, of which 4 of 255 steps without a graph


@pytest.mark.parametrize(("begun", "computed", "milliseconds"), [(10, 728.9, 752.3), (114, 669.7, 707.6)])
def test_a_gpu_waits_for_its_host_in_a_step_of_four_microbatches_as_long_as_it_did(begun, computed, milliseconds):
    """A round of 16 layers, and what the device computes of it: "predicted / measured" of 48 and of 1,024 rows."""
    launched = terms.launches(4 * 16, 0, replace(H200, layer_seconds=0.0001284))
    waited = terms.shown(launched, 2**14) + terms.changes(begun, 0)
    assert computed / 1000 + waited == pytest.approx(milliseconds / 1000, rel=0.01)


def test_larger_microbatches_than_were_measured_hide_no_more_of_their_launches():
    assert terms.shown(0.01, 2**16) == pytest.approx(terms.shown(0.04, 2**14))
    assert terms.shown(0.01, 2**12) == terms.shown(0.01, 2**14)


def test_a_draw_from_probabilities_takes_what_it_took():
    assert terms.sampling(1000 * 128256, H200) == pytest.approx(0.818e-3, rel=0.05)


@pytest.mark.parametrize(("rows", "milliseconds"), [(256, 1.43), (1024, 3.52)])
def test_rank_0_takes_what_it_took_for_the_results_of_a_step(rows, milliseconds):
    assert terms.host(1, rows, waits=False) == pytest.approx(milliseconds / 1000, rel=0.05)
    assert terms.host(1, rows, waits=True) > terms.host(1, rows, waits=False)


def test_a_message_of_256_mib_takes_what_one_alone_took():
    plain = replace(H200, hop=391e9)  # "GPU-aware MPI": plain Send and Recv, several under way
    assert terms.hop(2**28, plain) == pytest.approx(2**28 / 307e9, rel=0.05)
