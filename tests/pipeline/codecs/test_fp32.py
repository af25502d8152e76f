import numpy as np
import torch

from geomcache.pipeline.codecs.fp32 import Codec
from geomcache.pipeline.tokens import as_tensors
from tests.contracts.test_codecs import SPEC


def test_bits_are_kept_nan_payloads_too() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (3, 2, 5, 4), dtype=np.uint32)
    stored = Codec(SPEC).encode(torch.from_numpy(bits.view(np.float32)))["tokens"]
    assert stored.dtype == np.float32
    assert np.array_equal(stored.view(np.uint32), bits)
    assert np.array_equal(Codec(SPEC).decode(as_tensors({"tokens": stored})).numpy().view(np.uint32), bits)


def test_a_transposed_tensor_is_stored_in_order() -> None:
    tokens = torch.arange(6.0).reshape(2, 3).T
    assert Codec(SPEC).encode(tokens)["tokens"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
