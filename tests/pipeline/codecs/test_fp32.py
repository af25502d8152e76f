import numpy as np
import torch

from geomcache.pipeline.codecs.fp32 import Codec


def test_bits_are_kept_nan_payloads_too() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (3, 2, 5, 4), dtype=np.uint32)
    tokens = torch.from_numpy(bits.view(np.float32))
    stored = Codec().encode(tokens)["tokens"]
    assert stored.dtype == np.float32
    assert np.array_equal(stored.view(np.uint32), bits)
    assert np.array_equal(Codec().decode({"tokens": stored}).numpy().view(np.uint32), bits)
    assert Codec().max_relative_error == 0.0


def test_copies_only_where_it_must() -> None:
    stored = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.shares_memory(Codec().decode({"tokens": stored}).numpy(), stored)
    stored.flags.writeable = False  # as read from a memory map; torch would warn
    out = Codec().decode({"tokens": stored})
    out += 1
    assert stored[0, 0] == 0
    assert torch.equal(Codec().decode({"tokens": stored[:, ::2]}), torch.from_numpy(stored[:, ::2].copy()))


def test_a_transposed_tensor_is_stored_in_order() -> None:
    tokens = torch.arange(6.0).reshape(2, 3).T
    assert Codec().encode(tokens)["tokens"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
