"""An adapter that was trained on a masked memory can be turned back."""

import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.owner.mask import MaskedPLM, rotate
from reproduction.experiments import masked_head


@pytest.mark.parametrize("settings", [{"residual": True, "activation": "gelu"}, {"residual": True}, {}])
def test_an_adapter_of_a_masked_memory_turned_back_does_the_same(tiny_plm, settings):
    plm = tiny_plm()
    masked = MaskedPLM(plm, masked_head.published_mask(0))
    config = AdapterConfig(d=32, vocabulary_size=320, rank=8, plm=masked.description, **settings)
    adapter = Adapter(config, seed=1)
    with torch.no_grad():
        adapter.B_pd.normal_(generator=torch.Generator().manual_seed(1))
    adapter.B_rct = torch.randn(32, 8)
    Q = masked.mask.rotation(32, plm.description.fingerprint)
    plain = masked_head.unmasked(adapter, Q, plm.description)
    plain.require(plm.description)
    f = torch.randn(6, 32)
    Qf = rotate(f, Q.float())
    torch.testing.assert_close(plain.log_probs(f, plm.head()), adapter.log_probs(Qf, masked.head()), atol=1e-4, rtol=0)
    torch.testing.assert_close(rotate(plain.reconstruct(f), Q.float()), adapter.reconstruct(Qf), atol=1e-4, rtol=1e-4)
