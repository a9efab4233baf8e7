"""A device that no test has run on is probed first: the same bits as the CPU's kernels, or a refusal."""

import re

import numpy as np
import pytest

from common.errors import DataError
from common.pruners.devices import _probes, check_bits
from common.pruners.kernels.torch_engine import engine


@pytest.mark.slow
def test_torch_passes():
    check_bits(engine("cpu"), "cpu")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_probes_hold_what_devices_get_wrong(dtype):
    """Subnormals, zeros of both signs, and no infinity."""
    width, exponent = {"F16": (16, 0x7C00), "BF16": (16, 0x7F80), "F32": (32, 0x7F800000)}[dtype]
    bits = np.concatenate(_probes(dtype)).astype(np.int64) & ((1 << width) - 1)
    assert ((bits & exponent == 0) & (bits & (exponent ^ ((1 << width - 1) - 1)) != 0)).sum() > 100
    assert (bits == 0).any() and (bits == 1 << width - 1).any() and (bits & exponent != exponent).all()


@pytest.mark.slow  # compiles every kernel for every dtype
@pytest.mark.parametrize("name", ["add_kept", "keep_vector"])
def test_a_device_that_flushes_subnormals_is_refused(name):
    arithmetic = engine("cpu")
    real = getattr(arithmetic, name)

    def flushing(out, *arguments):
        finite = real(out, *arguments)
        if out.itemsize == 4:
            out[out & 0x7F800000 == 0] &= 0x80000000
        return finite

    setattr(arithmetic, name, flushing)
    with pytest.raises(
        DataError, match=r"^--device mps: computes other bits than the CPU \(\d+ of the probing float32 values\)"
    ):
        check_bits(arithmetic, "mps")


def test_a_device_that_lacks_a_call_is_refused():
    arithmetic = engine("cpu")

    def random_mask(*_):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    arithmetic.random_mask = random_mask
    line = "--device mps: lacks what pruning needs (Cannot convert a MPS Tensor to float64 dtype"
    with pytest.raises(DataError, match=re.escape(line)):
        check_bits(arithmetic, "mps")
