"""Which products go by the kernel of fixed order: the faster ones to the same bits, and those that keep no order."""

import pytest
import torch
import torch.nn.functional as F

from noria.kernels import in_order
from noria.launch import choosing
from noria.launch.choosing import chosen_products, multiply

CPU = torch.device("cpu")
ITS = [(128, 64, True, 300), (100, 64, False, 128)]


def right(hidden, weight, bias):
    """In float64, and so of any number of rows."""
    return F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()).to(hidden.dtype)


def multiplied(hidden, weight, bias):
    return right(hidden, weight, bias)


def wrong(hidden, weight, bias):
    return right(hidden, weight, bias) * 1.01


def depends(hidden, weight, bias):
    return right(hidden, weight, bias) * (1 + 0.01 * (len(hidden) == 1 and len(weight) == 100))


def at(*rows):
    """Times by which the kernel is faster with so many rows, and slower with others."""
    return lambda linear, its: 1.0 if linear is right else 0.5 if len(its[0]) in rows else 0.95


@pytest.mark.parametrize(
    ("faster", "chosen"), [((1, 8), {*range(1, 9)}), ((16, 64), {*range(9, 17), *range(49, 65)}), ((), None)]
)
def test_numbers_of_rows_go_by_the_kernel_where_it_is_faster(faster, chosen):
    found = chosen_products(ITS, CPU, torch.bfloat16, right, multiplied, at(*faster))
    assert found == ({} if chosen is None else {(128, 64, True): chosen, (100, 64, False): chosen})


def test_a_kernel_of_other_bits_is_not_chosen():
    assert chosen_products(ITS, CPU, torch.bfloat16, right, wrong, at(*choosing.BOUNDS)) == {}


def test_a_product_whose_bits_depend_on_the_rows_goes_by_the_kernel_with_any_number_of_them():
    found = chosen_products(ITS, CPU, torch.bfloat16, depends, multiplied, lambda *its: 1.0)
    assert found == {(100, 64, False): in_order.ALL}


def test_without_memory_nothing_is_chosen():
    def fails(*given):
        raise torch.OutOfMemoryError

    assert chosen_products(ITS, CPU, torch.bfloat16, fails) == {}


def test_what_was_chosen_is_computed_so(monkeypatch):
    hidden, weight = torch.ones(3, 8).bfloat16(), torch.ones(5, 8).bfloat16()
    monkeypatch.setattr(in_order, "product", wrong)
    assert torch.equal(multiply(hidden, weight, None), F.linear(hidden, weight))
    with in_order.products_by_kernel({(5, 8, False): range(4)}):
        assert torch.equal(multiply(hidden, weight, None), wrong(hidden, weight, None))
