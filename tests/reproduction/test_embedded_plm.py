"""The embedded PLM's training: training inputs equal the inputs in use."""

import pytest
import torch

from reproduction.models import embedded_plm

PREFIX = [1, 5, 6]
EXAMPLES = [([7, 8, 9, 1], 2), ([10, 11, 1], 1), ([12, 13, 14, 15, 1], 3), ([16, 17, 1], 2)]


def test_no_source_of_dev_or_test_is_trained_on():
    pairs = [(f"sentence {i % 2500}", f"satz {i}") for i in range(4000)]
    parts = embedded_plm.split(pairs)
    sources = {part: {source for source, _ in some} for part, some in parts.items()}
    assert (len(sources["dev"]), len(sources["test"])) == (1000, 1000)
    assert not sources["train"] & (sources["dev"] | sources["test"])
    assert not sources["dev"] & sources["test"]
    assert sum(map(len, parts.values())) == len(pairs)


def test_every_example_is_packed_once_and_fits():
    rows = embedded_plm.pack(EXAMPLES, PREFIX, 12, [2, 0, 3, 1])
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3]
    assert all(len(PREFIX) + sum(len(EXAMPLES[i][0]) for i in row) <= 12 for row in rows)


def test_an_example_in_a_packed_row_is_as_it_is_alone(tiny_model):
    model = tiny_model("llama")
    rows = embedded_plm.pack(EXAMPLES, PREFIX, 12, [0, 1, 2, 3])
    tokens, positions, labels, mask = embedded_plm.collate(rows, EXAMPLES, PREFIX, 12)
    packed = model(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
    for r, row in enumerate(rows):
        at = len(PREFIX)
        for i in row:
            ids, prompt = EXAMPLES[i]
            alone = model(input_ids=torch.tensor([PREFIX + ids])).logits[0, len(PREFIX) :]
            torch.testing.assert_close(packed[r, at : at + len(ids)], alone, atol=1e-5, rtol=1e-4)
            expected = [-100] * (prompt - 1) + ids[prompt:] + [-100]
            assert labels[r, at : at + len(ids)].tolist() == expected
            at += len(ids)


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_orthogonalise_brings_all_singular_values_near_one(shape):
    values = torch.linalg.svdvals(
        embedded_plm.orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    )
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_goes_down_on_a_quadratic():
    torch.manual_seed(0)
    w, goal = torch.nn.Parameter(torch.zeros(6, 4)), torch.randn(6, 4)
    optimizer = embedded_plm.Muon([w], lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(200):
        loss = (w - goal).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
